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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funcmlo import _random, _tracing
from funcmlo._tree import Tree
from funcmlo.compiler import DIGITS, UNFIT, Answer, Reference, answer, apart, arbitrary
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.recording.code import Make, code
from funcmlo.recording.effects import PROFILED, watching
from funcmlo.recording.replay import Parts, split
from funcmlo.recording.tape import Tape, below_autograd, kind, record
from funcmlo.replaying.layout import Layout

LEAST, MOST = 4, 2**22
"""The steps from which recording pays, and how many scalars a step may compute."""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a level's steps: their tape as code, or why there is none.

    Attributes:
        why: why its steps are not replayed; None where they are.
        tape: the tape, without the tensors themselves.
        closed: the tensors that it closes over, by number, as long as somebody has them.
        parts: the tape's parts.
        make: its code.
        extra: what the recorded function told besides.
    """

    why: str | None
    tape: Tape | None = None
    closed: Mapping[int, Callable[[], Tensor | None]] = field(default_factory=dict)
    parts: Parts | None = None
    make: Make | None = None
    extra: Any = None

    def fits(self, tape: Tape) -> bool:
        """Say whether another recording came to the same on the same tensors closed over."""
        return self.does_as(tape) and tape.closes_over({n: x() for n, x in self.closed.items()})

    def does_as(self, tape: Tape) -> bool:
        """Say whether another recording came to the same operations."""
        return self.tape is not None and tape.does_as(self.tape)


_KNOWN: weakref.WeakKeyDictionary[Level, dict[Any, Known]] = weakref.WeakKeyDictionary()


def replayable(problem: Problem, steps: int, *, tasks: bool = False) -> bool:
    """Say whether a loop's steps are of a kind that may be replayed at all; those of all tasks together, if they may."""
    level = problem.level
    return (
        (problem.compiler is not None or (level.replay and steps >= LEAST))
        and steps > 0
        and (problem.tasks is None or (tasks and problem.has_tasks and problem.tasks.at_once == problem.tasks.n))
        and problem.sharing is None
        and not (level.has_solver or level.carries_buffers or level.project or level.autocast or level.loss_scale)
        and not _tracing.unreadable()
    )


def compiles(problem: Problem) -> bool:
    """Say whether a level's products may be compiled."""
    return problem.compiler is not None and replayable(problem, 1)


def told(level: Level) -> str:
    """Say what became of a level's steps.

    Args:
        level: the level.

    Returns:
        "replayed"; why they are not; or that nothing has been tried.
    """
    known = _KNOWN.get(level, {}).values()
    if any(one.why is None for one in known):
        return "replayed"
    return next((one.why for one in known if one.why), "not tried")


Tensors = Sequence[Tensor | None]
Function = Callable[[Problem, Any, dict[str, Tree], Sequence[Tensor], int], tuple[Tensors, Tensors, Any]]
"""function(problem, standing, inputs, cotangents, t) → (results, products, extra): what is recorded of a step.

The results, the new standing first, depend on no cotangent; the extra is whatever else the caller wants to know of it.
"""


class Recording:
    """One loop's recordings, until its steps can be replayed.

    What another loop recorded is taken on trust, and is held against a step as it is written when the loop ends; where the
    program is compiled, not even that.

    Args:
        problem: the level, bound.
        function: what is recorded of a step; its first results depend on no cotangent.
        layout: how what it takes is laid out.
        name: sets recordings of other functions of the level apart.

    Attributes:
        forward: the step, once it can be replayed.
        backward: its products.
        draws: whether it draws random numbers.
        extra: what the function told besides when it was recorded last.
        given_up: whether it is not going to be replayed.
    """

    def __init__(self, problem: Problem, function: Function, layout: Layout, name: str) -> None:
        self._function, self._layout, self._name, self._results = function, layout, name, 0
        self._level, self._compiler, self._tasks = problem.level.name, problem.compiler, problem.tasks is not None
        self._known = _KNOWN.setdefault(problem.level, {}) if self._compiler is None else self._compiler.of(self._level)
        self._before: Tape | None = None
        self.forward: Callable[..., Any] | None = None
        self.backward: Callable[..., Any] | None = None
        self.draws = self.given_up = False
        self.extra: Any = None

    def trust(self, varying: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
        """Take what another loop recorded, if what it closed over is still there."""
        known = self._known.get(self._called([*varying, *self._layout.fixed, *cotangents]))
        if known is None or known.why is not None:
            return
        closed = {n: x() for n, x in known.closed.items()}
        if all(x is not None for x in closed.values()):
            self.extra = known.extra
            self._bind(known, closed)

    def ready(self, problem: Problem, varying: Sequence[Tensor], cotangents: Sequence[Tensor]) -> bool:
        """Record, of a step whose results nobody needs, until it can be replayed, and say whether it can."""
        while self.forward is None and not self.given_up:
            self.again(problem, varying, cotangents, 0)
        return self.forward is not None

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
                one, standing, inputs, tensors[layout.varying + len(layout.fixed) :], t
            )
            self._results = len(results)
            return [*results, *products]

        tensors = [*varying, *layout.fixed, *cotangents]
        key = self._called(tensors)
        known, most = self._known.get(key), MOST if self._compiler is None else None
        if known is None:
            with watching() as seen:
                outputs, tape, why = record(flat, tensors, most)
            why = why or seen.why
        else:
            outputs, tape, why = record(flat, tensors, most)
        standing = list(zip(outputs[: layout.standing.num_leaves], tensors, strict=False))
        if tape is None or why is not None:
            self._give_up(key, why)
        elif any(x is not None and kind(x) != kind(y) for x, y in standing if self._results > len(standing)):
            self._give_up(key, "its parameters or its optimizer's state change their form")
        elif known is not None and known.fits(tape):
            self._bind(known, tape.constants)
        elif self._before is None:
            self._before = tape
        elif tape.does_as(self._before) and tape.closes_over(self._before.constants):
            if known is None or not known.does_as(tape):
                again = partial(self._divided, flat)
                known = self._learnt(tape, tensors, again, problem.seed_of("", t))
            if known.why is not None:
                self._give_up(key, known.why)
            else:
                self._known[key] = known
                self._bind(known, tape.constants)
        else:
            self._give_up(key, "two steps came to different operations")
        return outputs[: self._results]

    def refused(self, varying: Sequence[Tensor], cotangents: Sequence[Tensor]) -> bool:
        """Say whether it is known already that a step on such tensors is not to be replayed."""
        known = self._known.get(self._called([*varying, *self._layout.fixed, *cotangents]))
        return known is not None and known.why is not None

    def _called(self, tensors: Sequence[Tensor]) -> Any:
        layout = self._layout  # numbers that come with a batch are part of what was recorded
        return self._name, layout.varying, tuple(map(kind, tensors)), repr((layout.shared_leaves, layout.batch_leaves))

    def _divided(self, flat: Callable[..., Tensors], given: Sequence[Tensor]) -> Answer:
        outputs = [None if x is None else x.detach() for x in flat(*(x.detach() for x in given))]
        return outputs[: self._results], outputs[self._results :]

    def _learnt(self, tape: Tape, tensors: Sequence[Tensor], reference: Reference, seed: int) -> Known:
        varying, fixed = self._layout.varying, len(self._layout.fixed)
        parts = split(tape, varying, fixed, self._results)
        if isinstance(parts, str):
            return Known(parts)
        if parts.draws and self._tasks:
            return Known("its tasks draw random numbers")
        settings = parts, varying, range(varying + fixed, tape.inputs), [kind(x) for x in tape.tensors]
        make, _ = code(*settings)
        closed: dict[int, Callable[[], Tensor | None]] = {n: weakref.ref(x) for n, x in tape.constants.items()}
        outside = self._outside(parts, tape.constants)
        if self._compiler is None:
            random = arbitrary(tensors[varying + fixed :])
            expected = reference([*tensors[: varying + fixed], *random])
            with _random.seeded(seed):
                found = answer(make, outside, tensors[:varying], random)
            # Products are held against autograd's own at other cotangents; results are looked at in every loop.
            if random and not apart(found, expected, ()) <= DIGITS:
                return Known("its derivative by recorded operations is another one")
        else:
            closed = {n: partial(_itself, x) for n, x in tape.constants.items()}
            made = self._compiler.make(f"{self._level}: {self._name}", settings, reference, outside, tensors)
            if isinstance(made, str):
                return Known(made)
            make = made
        bare = replace(tape, constants=dict.fromkeys(tape.constants, torch.empty(0)), tensors=())
        return Known(None, bare, closed, parts, make, self.extra)

    def _outside(self, parts: Parts, constants: Mapping[int, Any]) -> list[Tensor]:
        first, fixed = self._layout.varying, self._layout.fixed
        return [fixed[n - first] if first <= n < first + len(fixed) else constants[n] for n in parts.outside]

    def _bind(self, known: Known, constants: Mapping[int, Any]) -> None:
        assert known.parts is not None
        assert known.make is not None
        with below_autograd():
            self.forward, self.backward = known.make(self._outside(known.parts, constants))
        self.draws = known.parts.draws

    def _give_up(self, key: Any, why: str | None) -> None:
        self.given_up = True
        if why not in {PROFILED, UNFIT}:
            self._known[key] = Known(why or "its operations could not be recorded")
            if self._compiler is not None:
                self._compiler.refuse(f"{self._level}: {self._name}", self._known[key].why)


def _itself(x: Tensor) -> Tensor:
    return x
