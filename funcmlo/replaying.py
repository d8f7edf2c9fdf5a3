"""Small inner steps, replayed: recorded twice, then done again by their operations alone.

On a small problem most of a step's time is Python's, the dispatcher's and autograd's, and not arithmetic. So the first two
steps of a loop are made as they are written and recorded; where both come to the same operations, the others are replayed,
without Python, without a graph, what does not change from step to step computed once. The numbers are the same to the bit.

A loss that does anything besides computing with tensors (it prints, counts its calls, asks for a value) is never replayed,
nor are steps whose tensors are large, which would gain nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Fixed
from funcmlo.hypergrad.solved import Standing
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.recording.effects import PROFILED, watching
from funcmlo.recording.code import Make, code
from funcmlo.recording.replay import Parts, split
from funcmlo.recording.tape import Tape, Kind, below_autograd, kind, record, same

LEAST, MOST = 4, 2**18
"""The steps from which recording pays, and how many scalars a step may compute."""

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a level's steps: their tape as code, or why there is none.

    Attributes:
        why: why its steps are not replayed; None where they are.
        tape: the tape, without what it closes over.
        closed: the tensors that it closes over, as long as somebody has them.
        parts: the tape's parts.
        make: its code.
    """

    why: str | None
    tape: Tape | None = None
    closed: Mapping[int, weakref.ref[Tensor]] = field(default_factory=dict)
    parts: Parts | None = None
    make: Make | None = None

    def fits(self, tape: Tape) -> bool:
        """Say whether another recording came to the same on the same tensors closed over."""
        return self.does_as(tape) and tape.closes_over({n: x() for n, x in self.closed.items()})

    def does_as(self, tape: Tape) -> bool:
        """Say whether another recording came to the same operations."""
        return self.tape is not None and tape.does_as(self.tape)


_KNOWN: weakref.WeakKeyDictionary[Level, dict[Any, Known]] = weakref.WeakKeyDictionary()


def replayable(problem: Problem, steps: int) -> bool:
    """Say whether a loop's steps are of a kind that may be replayed at all."""
    level = problem.level
    return (
        level.replay
        and steps >= LEAST
        and problem.tasks is None
        and problem.sharing is None
        and not (level.has_solver or level.carries_buffers or level.project or level.autocast or level.loss_scale)
        and not _tracing.transforming()
    )


def reason(level: Level) -> str | None:
    """Return why a level's steps were not replayed, or None: they were, or no loop has been long enough to try.

    Args:
        level: the level.

    Returns:
        The reason.
    """
    return next((known.why for known in _KNOWN.get(level, {}).values() if known.why), None)


@dataclass(frozen=True, eq=False)
class Layout:
    """How what a step takes is laid out flat: standing and batch, which vary, then inputs, which do not.

    Attributes:
        standing: the structure of (parameters, optimizer state).
        batch: the structure of the batch; None for one that is the same at every step.
        inputs: the structure of the inputs.
        constants: the batch's leaves, with what their kind is in place of tensors.
        varying: how many tensors standing and batch have.
        fixed: how many the inputs have.
    """

    standing: Any
    batch: Any
    inputs: Any
    constants: tuple[Any, ...]
    varying: int
    fixed: int

    @staticmethod
    def of(problem: Problem, standing: Standing, inputs: dict[str, Tree], t: int) -> Layout | None:
        """Return a step's layout, or None where something in the standing or the inputs is no plain tensor."""
        own, structure = _tree.flatten(standing)
        read, of_inputs = _tree.flatten(inputs)
        if not all(type(x) in _PLAIN for x in (*own, *read)):
            return None
        if isinstance(problem.feed, Fixed):
            return Layout(structure, None, of_inputs, (), len(own), len(read))
        batch, of_batch = _tree.flatten(problem.feed(problem.first + t))
        if any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in batch):
            return None
        tensors = sum(isinstance(x, Tensor) for x in batch)
        return Layout(structure, of_batch, of_inputs, _kinds(batch), len(own) + tensors, len(read))

    def flat(self, problem: Problem, standing: Standing, t: int) -> list[Tensor] | None:
        """Return what varies at a step, or None where its batch is another kind of thing."""
        own = _tree.leaves(standing)
        if self.batch is None:
            return own
        batch, structure = _tree.flatten(problem.feed(problem.first + t))
        if structure != self.batch or not same(_kinds(batch), self.constants):
            return None
        return [*own, *(x for x in batch if isinstance(x, Tensor))]

    def whole(self, problem: Problem, tensors: Sequence[Tensor]) -> tuple[Problem, Standing, dict[str, Tree]]:
        """Return the problem with its batch, the standing and the inputs from what is laid out flat."""
        n = self.standing.num_leaves
        standing = _tree.unflatten(self.standing, tensors[:n])
        inputs = _tree.unflatten(self.inputs, tensors[self.varying : self.varying + self.fixed])
        if self.batch is not None:
            rest = iter(tensors[n : self.varying])
            batch = _tree.unflatten(self.batch, [next(rest) if type(x) is Kind else x for x in self.constants])
            problem = replace(problem, feed=Fixed(batch))
        return problem, standing, inputs


def _kinds(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(kind(x) if isinstance(x, Tensor) else x for x in leaves)


Tensors = Sequence[Tensor | None]
Function = Callable[[Problem, Standing, dict[str, Tree], Sequence[Tensor], int], tuple[Tensors, Tensors, Any]]
"""function(problem, standing, inputs, cotangents, t) → (results, products, extra): what is recorded of a step.

The results, the new standing first, depend on no cotangent; the extra is whatever else the caller wants to know of it.
"""


class Recording:
    """One loop's recordings, until its steps can be replayed.

    Args:
        problem: the level, bound.
        function: what is recorded of a step; its first results depend on no cotangent.
        layout: how what it takes is laid out.
        inputs: the parameters of the levels that it reads.
        name: sets recordings of other functions of the level apart.

    Attributes:
        forward: the step, once it can be replayed.
        backward: its products.
        draws: whether it draws random numbers.
        extra: what the function told besides when it was recorded last.
        given_up: whether it is not going to be replayed.
    """

    def __init__(self, problem: Problem, function: Function, layout: Layout, inputs: dict[str, Tree], name: str) -> None:
        self._function, self._layout, self._results = function, layout, 0
        self._read = _tree.leaves(inputs)
        self._known = _KNOWN.setdefault(problem.level, {})
        self._name = name
        self._key: Any = None
        self._before: Tape | None = None
        self.forward: Callable[..., Any] | None = None
        self.backward: Callable[..., Any] | None = None
        self.draws = self.given_up = False
        self.extra: Any = None

    def again(self, problem: Problem, varying: Sequence[Tensor], cotangents: Sequence[Tensor], t: int) -> Tensors:
        """Make a step and record it; after that `forward` and `backward` may be there, or `given_up` be set.

        Args:
            problem: the level, bound.
            varying: the standing's and the batch's tensors.
            cotangents: what is pulled back.
            t: the step's number.

        Returns:
            The function's results.
        """
        layout = self._layout

        def flat(*tensors: Tensor) -> Tensors:
            one, standing, inputs = layout.whole(problem, tensors)
            results, products, self.extra = self._function(
                one, standing, inputs, tensors[layout.varying + layout.fixed :], t
            )
            self._results = len(results)
            return [*results, *products]

        tensors = [*varying, *self._read, *cotangents]
        self._key = (self._name, layout.batch is None, tuple(map(kind, tensors)))
        known = self._known.get(self._key)
        if known is None:
            with watching() as seen:
                outputs, tape, why = record(flat, tensors, MOST)
            why = why or seen.why
        else:
            outputs, tape, why = record(flat, tensors, MOST)
        n = layout.standing.num_leaves
        if tape is None or why is not None:
            self._give_up(why)
        elif any(kind(x) != kind(y) for x, y in zip(outputs[:n], tensors, strict=False) if x is not None):
            self._give_up("its parameters or its optimizer's state change their form")
        elif known is not None and known.fits(tape):
            self._bind(tape, known)
        elif self._before is None:
            self._before = tape
        elif tape.does_as(self._before) and tape.closes_over(self._before.constants):
            self._bind(tape, known if known is not None and known.does_as(tape) else self._learnt(tape))
        else:
            self._give_up("two steps came to different operations")
        return outputs[: self._results]

    def refused(self, varying: Sequence[Tensor], cotangents: Sequence[Tensor]) -> bool:
        """Say whether it is known already that a step on such tensors is not to be replayed."""
        kinds = tuple(map(kind, (*varying, *self._read, *cotangents)))
        known = self._known.get((self._name, self._layout.batch is None, kinds))
        return known is not None and known.why is not None

    def _learnt(self, tape: Tape) -> Known:
        layout = self._layout
        parts = split(tape, layout.varying, layout.fixed, self._results)
        if isinstance(parts, str):
            return Known(parts)
        cotangents = range(layout.varying + layout.fixed, tape.inputs)
        make, _ = code(parts, layout.varying, cotangents, [kind(x) for x in tape.tensors])
        closed = {n: weakref.ref(x) for n, x in tape.constants.items()}
        known = Known(None, replace(tape, constants=dict.fromkeys(tape.constants), tensors=()), closed, parts, make)
        self._known[self._key] = known
        return known

    def _bind(self, tape: Tape, known: Known) -> None:
        if known.parts is None or known.make is None:
            self._give_up(known.why)
            return
        first = self._layout.varying
        outside = [self._read[n - first] if n < tape.inputs else tape.constants[n] for n in known.parts.outside]
        with below_autograd():
            self.forward, self.backward = known.make(outside)
        self.draws = known.parts.draws

    def _give_up(self, why: str | None) -> None:
        self.given_up = True
        if why != PROFILED:
            self._known[self._key] = Known(why or "its operations could not be recorded")
