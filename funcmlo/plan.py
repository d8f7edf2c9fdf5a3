"""What follows from a program's levels: their graph, what runs when, and what each has to do with the others."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from funcmlo import _tracing, precision
from funcmlo.batches import feeds
from funcmlo.declared import check_levels, check_nested, task_roles
from funcmlo.dependence import Dependence, dependence
from funcmlo.doubts import doubts, inexact
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning, ParameterError, listing
from funcmlo.graph import Graph
from funcmlo.level import Level
from funcmlo.loops import Walk
from funcmlo.nested import Nest
from funcmlo.roles import Roles, roles
from funcmlo.schedule import Loop, Schedule, schedule
from funcmlo.sharing import checked_parallel
from funcmlo.state import State

Composition = Literal["paths", "nested"]


@dataclass(frozen=True)
class Plan:
    """What follows from a program's levels.

    Attributes:
        levels: the levels, lowest first.
        composition: how their best responses are put together.
        graph: their graph.
        needs: what total costs need.
        users: for each level, the levels that differentiate through it.
        keepers: for each level, those that do so in either composition: a state serves both.
        below: for each level, the levels whose loops run before its updates, the highest first.
        roles: what they have to do with tasks and with other processes.
        schedule: the order of an outer step.
    """

    levels: tuple[Level, ...]
    composition: Composition
    graph: Graph
    needs: Dependence
    users: Mapping[str, tuple[str, ...]]
    keepers: Mapping[str, tuple[str, ...]]
    below: Mapping[str, Sequence[str]]
    roles: Roles
    schedule: Schedule

    @staticmethod
    def of(levels: Sequence[Level], composition: Any, parallel: Any) -> Plan:
        """Work out what follows from some levels.

        Args:
            levels: the levels, lowest first.
            composition: how their best responses are put together.
            parallel: what processes share.

        Returns:
            The plan.

        Raises:
            DefinitionError: the levels do not fit together.
        """
        if not levels or not all(isinstance(level, Level) for level in levels):
            came = listing(type(level).__name__ for level in levels)
            raise DefinitionError(f"Multilevel takes Level objects, lowest first; {came} came.")
        if composition not in get_args(Composition):
            raise DefinitionError(f"composition={composition!r}; expected {' or '.join(map(repr, get_args(Composition)))}.")
        shared = checked_parallel(parallel)
        graph = Graph.of(levels)
        names, needs, nested = graph.levels, dependence(graph), composition == "nested"
        responding = {k: graph.responding(k) for k in names}
        by_paths = {name: tuple(k for k in names if name in responding[k]) for name in names}
        by_nesting = {name: tuple(needs.users(name)) for name in names}
        users = by_nesting if nested else by_paths
        check_levels(levels, graph, users)
        tasks = task_roles(levels, responding)
        if nested:
            check_nested(levels, needs)
        if nested and shared is not None and shared != "data":
            raise DefinitionError(
                f'composition="nested" solves all tasks as one problem and replays no samples, so processes share batches '
                f"alone; parallel={shared!r} came, expected parallel='data' or composition=\"paths\"."
            )
        below = {name: graph.below(name)[::-1] for name in names}
        if nested:
            below = {name: _highest_first(names, {*below[name], *needs.needed[name]}) for name in names}
        return Plan(
            levels=tuple(levels),
            composition=composition,
            graph=graph,
            needs=needs,
            users=users,
            keepers={name: tuple(k for k in names if k in (*by_paths[name], *by_nesting[name])) for name in names},
            below=below,
            roles=roles(levels, users, tasks, shared),
            schedule=schedule(levels, graph, below, share=not nested),
        )

    def warn(self, stacklevel: int) -> None:
        """Warn about what is legal and yet probably not meant.

        Args:
            stacklevel: whom to blame, as `warnings.warn` counts from here.
        """
        nested = self.composition == "nested"
        for warning in doubts(self.levels, self.graph) + ([] if nested else inexact(self.graph)):
            warnings.warn(warning, FuncmloWarning, stacklevel=stacklevel + 1)

    def ahead(self, of: str, solve: bool) -> tuple[tuple[Loop | str, ...], Loop, set[str]]:
        """Return what precedes the first loop of a level, that loop, and the levels that run before its first update.

        Args:
            of: the level.
            solve: whether inner loops run.

        Returns:
            Loops and levels that begin, a loop, and names.
        """
        self.graph.check(of)
        before, own = self.schedule.before(of) if solve else ((), Loop(of, 1))
        loops = [item for item in (*before, *own.first) if isinstance(item, Loop)]
        return before, own, {of}.union(*(loop.levels() for loop in loops))

    def whole(self) -> AbstractContextManager[None]:
        """Return the context of the program's work, in which maps alone do not keep derivatives from plain autograd."""
        return _tracing.whole_program(self.composition == "paths")  # nested solutions are custom derivatives

    def passed_over(self, state: State) -> State:
        """Return a state with its step counters as after an outer step, and all else as it was."""
        made = Counter(self.schedule)
        return replace(state, step={name: step + made[name] for name, step in state.step.items()})

    def begin(
        self, running: Collection[str], state: State, batches: Mapping[str, Any], *, pure: bool, solve: bool = True
    ) -> Walk | Nest:
        """Check what came in, before anything runs, and set out with the feeds of the levels that will run.

        Args:
            running: the levels that will run.
            state: where the program stands.
            batches: by level name.
            pure: whether nothing may be used up.
            solve: whether inner loops run.

        Returns:
            The work, not yet begun.

        Raises:
            ParameterError: the state is no state, or another program's.
            EstimatorError: gradients cannot be taken here.
            BatchError: a batch is missing or cannot be used.
        """
        if not isinstance(state, State):
            raise ParameterError(f"expected the State that program.init returns; {type(state).__name__} came.")
        if set(state.params) != set(self.graph.levels):
            raise ParameterError(
                f"the state belongs to another program: it has levels {listing(state.params)}; expected "
                f"{listing(self.graph.levels)}."
            )
        if torch.is_inference_mode_enabled():
            raise EstimatorError(
                "step and hypergradient take gradients, which torch.inference_mode forbids; use torch.no_grad, or nothing."
            )
        if _tracing.differentiating():
            raise EstimatorError(
                "step and hypergradient cannot be differentiated (torch.func.grad, vjp or jvp is active); differentiate "
                "an ordinary function of the parameters instead, with fm.argmin for what is solved inside."
            )
        if self.composition == "nested" and _tracing.transforming():
            raise EstimatorError(
                'composition="nested" solves again inside its derivatives and cannot be mapped (torch.func.vmap is active); '
                "call step in a loop, or map over fm.argmin."
            )
        levels = {level.name: precision.inherited(level, state.params[level.name]) for level in self.levels}
        own = [levels[name] for name in running]
        feed = feeds(own, self.graph.levels, batches, state.step, pure=pure, tasks=self.roles.tasks)
        if self.composition == "nested":
            return Nest(levels, self.needs, self.below, self.roles, feed, state, solve)
        several = {name for name, users in self.keepers.items() if len(users) > 1}
        return Walk(levels, self.graph, self.users, several, self.roles, feed, state)


def _highest_first(order: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in reversed(order) if name in names)
