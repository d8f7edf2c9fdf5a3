"""Calls of a program compiled as a whole: one graph for all inner steps, solves and gradients together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._hiding import hiding
from funcmlo._tree import Tree
from funcmlo.batches import is_fixed
from funcmlo.compiler import Compiler, Reference
from funcmlo.hypergrad.stats import Stats
from funcmlo.plan import Plan
from funcmlo.recording.replay import split
from funcmlo.recording.tape import Tape, below_autograd, kind, record
from funcmlo.state import State

MOST = 4
"""How many captures of one call there may be that differ by numbers other than tensors."""

Call = Callable[[State, Mapping[str, Any]], Tree]
Metrics = dict[str, dict[str, Any]]


class Program(Protocol):
    """What is compiled: a program's two calls."""

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, Metrics]:
        """Make one outer step."""

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True, with_stats: bool = False
    ) -> Any:
        """Return a hypergradient."""


@dataclass(frozen=True, eq=False)
class Whole:
    """A program's calls as one graph each.

    Attributes:
        program: the program as it is written.
        plan: its plan.
        compiler: what compiles it.
    """

    program: Program
    plan: Plan
    compiler: Compiler

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, Metrics] | None:
        """Make one outer step, or return None where it has to be made as it is written."""
        found = self._answer("step", self.program.step, state, batches)
        if found is None or not bool(_tree.finite((found[0].params, [of["cost"] for of in found[1].values()]))):
            return None
        after, metrics = found
        metrics = {name: {**of, "stats": _plain(of["stats"])} if "stats" in of else of for name, of in metrics.items()}
        return replace(after, step=self.plan.passed_over(state).step, seed=state.seed), metrics

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], of: str, solve: bool
    ) -> tuple[Tree, dict[str, Any]] | None:
        """Return a hypergradient with its stats, or None where it has to be taken as it is written."""

        def call(state: State, batches: Mapping[str, Any]) -> Tree:
            return self.program.hypergradient(state, batches, of=of, solve=solve, with_stats=True)

        found = self._answer(f"hypergradient of {of}" + " where it stands" * (not solve), call, state, batches)
        if found is None or not bool(_tree.finite(found[0])):
            return None
        return found[0], _plain(found[1])

    def _answer(self, name: str, call: Call, state: State, batches: Mapping[str, Any]) -> Any:
        # Captured and compiled at first use. What is not as expected is left to the call as it is written, which says so.
        if not self._takes(state, batches):
            return None
        flat, structure = _tree.flatten((replace(state, step={}, seed=0), dict(batches)))
        known = self.compiler.of(name)
        key = structure, tuple(kind(x) if isinstance(x, Tensor) else x for x in flat)
        if key not in known and not bool(_tree.finite([x for x in flat if isinstance(x, Tensor)])):
            return None
        if key not in known:
            many = len(known) >= MOST
            if many:
                self.compiler.refuse(name, f"{MOST} forms of its state and batches were compiled, and another came")
            known[key] = None if many else self._captured(name, call, state, flat, structure)
        captured: Captured | None = known[key]
        if captured is None:
            return None
        with below_autograd():
            found, _ = captured.forward(*(x for x in flat if isinstance(x, Tensor)))
        return captured.rebuild(list(found))

    def _takes(self, state: Any, batches: Any) -> bool:
        if _tracing.unreadable() or not isinstance(state, State) or not isinstance(batches, Mapping):
            return False
        levels = {level.name: level for level in self.plan.levels}
        tensors = [x for x in _tree.leaves((state, dict(batches))) if isinstance(x, Tensor)]
        return (
            set(state.params) == set(levels)
            and all(map(is_fixed, batches.values()))
            and all(state.step[name] >= level.warmup for name, level in levels.items())
            and all(type(x) in (Tensor, torch.nn.Parameter) and not x.requires_grad for x in tensors)
        )

    def _captured(self, name: str, call: Call, state: State, flat: Sequence[Any], structure: Any) -> Captured | None:
        tensors = [x for x in flat if isinstance(x, Tensor)]
        box: list[Callable[[list[Tensor]], Tree]] = []

        def function(*given: Tensor) -> list[Tensor | None]:
            rest = iter(given)
            inside, batches = _tree.unflatten(structure, [next(rest) if isinstance(x, Tensor) else x for x in flat])
            with hiding():
                found, whole = _tree.partition(call(replace(inside, step=state.step, seed=state.seed), batches))
            box.append(whole)
            return [*found]

        _, tape, why = record(function, tensors, None)
        if tape is not None and why is None:
            made = self._compiled(name, tape, tensors, lambda given: (function(*given), ()))
            if not isinstance(made, str):
                return Captured(made, box[-1])
            why = made
        self.compiler.refuse(name, why)
        return None

    def _compiled(self, name: str, tape: Tape, tensors: Sequence[Tensor], reference: Reference) -> Callable[..., Any] | str:
        parts = split(tape, len(tensors), 0, len(tape.outputs))
        if isinstance(parts, str):
            return parts
        settings = parts, len(tensors), (), [kind(x) for x in tape.tensors]
        outside = [tape.constants[n] for n in parts.outside]
        made = self.compiler.make(name, settings, reference, outside, tensors, moves=False)
        if isinstance(made, str):
            return made
        with below_autograd():
            return made(outside)[0]


@dataclass(frozen=True, eq=False)
class Captured:
    """A call as one graph.

    Attributes:
        forward: tensors ↦ tensors.
        rebuild: what makes the answer of them.
    """

    forward: Callable[..., Any]
    rebuild: Callable[[list[Tensor]], Tree]


def _plain(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.plain() if isinstance(one, Stats) else one for name, one in stats.items()}
