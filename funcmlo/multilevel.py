"""`Multilevel`: a program of levels; state in, state out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from funcmlo import _tracing, _tree, finite, precision
from funcmlo._tree import Tree
from funcmlo.batches import feeds
from funcmlo.declared import check_levels, check_nested, task_roles
from funcmlo.dependence import dependence
from funcmlo.doubts import doubts, inexact
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning, ParameterError, listing
from funcmlo.graph import Graph
from funcmlo.initial import first_state
from funcmlo.level import Level
from funcmlo.loops import Walk
from funcmlo.nested import Nest
from funcmlo.purity import untouched
from funcmlo.schedule import Loop, Schedule, schedule
from funcmlo.state import State

Composition = Literal["paths", "nested"]


class Multilevel:
    """A program of levels, lowest first: pure functions from state to state.

    Args:
        *levels: the levels, the lowest first.
        composition: `"paths"`, the products along the graph's paths (Betty's eq. 2), which `graph.exact(k)` compares with
            the total derivative; or `"nested"`, the total derivative of any hierarchy, the Hessians through lower best
            responses included.

    Raises:
        DefinitionError: the levels do not fit together.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=20, response=fm.AID(fm.CG(5))),
        ...     fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.25)),
        ... )
        >>> state = program.init({"y": torch.zeros(()), "x": torch.zeros(())})
        >>> for _ in range(20):
        ...     state, metrics = program.step(state, {})
        >>> round(float(state.params["x"]), 3)
        1.0

    References:
        Choe et al. 2023 (Betty), arXiv 2207.02849.
    """

    def __init__(self, *levels: Level, composition: Composition = "paths") -> None:
        if not levels or not all(isinstance(level, Level) for level in levels):
            came = listing(type(level).__name__ for level in levels)
            raise DefinitionError(f"Multilevel takes Level objects, lowest first; {came} came.")
        if composition not in get_args(Composition):
            raise DefinitionError(f"composition={composition!r}; expected {' or '.join(map(repr, get_args(Composition)))}.")
        self.levels = levels
        self.composition = composition
        self.graph = Graph.of(levels)
        names = self.graph.levels
        self._needs = dependence(self.graph)
        nested = composition == "nested"
        responding = {k: self.graph.responding(k) for k in names}
        by_paths = {name: tuple(k for k in names if name in responding[k]) for name in names}
        by_nesting = {name: self._needs.users(name) for name in names}
        self._users = by_nesting if nested else by_paths
        # A state serves both compositions, so it has room for the estimators of either.
        self._keepers = {name: tuple(k for k in names if k in (*by_paths[name], *by_nesting[name])) for name in names}
        check_levels(levels, self.graph, self._users)
        self.tasks = task_roles(levels, responding)
        if nested:
            check_nested(levels, self._needs)
        for warning in doubts(levels, self.graph) + ([] if nested else inexact(self.graph)):
            warnings.warn(warning, FuncmloWarning, stacklevel=2)
        self._below = {name: self.graph.below(name)[::-1] for name in names}
        if nested:
            self._below = {name: _highest_first(names, {*self._below[name], *self._needs.needed[name]}) for name in names}
        self._schedule = schedule(levels, self.graph, self._below, share=not nested)

    def schedule(self) -> Schedule:
        """Return the order of one outer step, which prints itself.

        Returns:
            The schedule; iterating over it gives the level of every update in order.
        """
        return self._schedule

    def init(self, params: Mapping[str, Tree], *, buffers: Mapping[str, Tree] | None = None, seed: int = 0) -> State:
        """Return the program's first state.

        Args:
            params: each level's parameters, trees of floating-point tensors, which are copied. A level with `init=` may
                be left out. Those of a level with tasks lead with the task axis (`fm.per_task`), and so do its buffers.
            buffers: by level name, the buffers that losses read: trees of tensors, which are copied.
            seed: the integer from which all randomness follows.

        Returns:
            The state before the first step.

        Raises:
            ParameterError: a level's parameters are missing, unknown, or no tree of floating-point tensors; buffers that a
                loss reads are missing, or are no tensors.
        """
        given = {} if buffers is None else buffers
        return first_state(self.levels, self._keepers, self.tasks, params, given, seed)

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, dict[str, dict[str, Any]]]:
        """Make one outer step, in the order that `schedule()` tells.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch, an iterator (one batch per update) or a function from the level's
                step number to a batch.

        Returns:
            The new state, and metrics by level, of its last inner loop: `cost` (at the last update, before it), `costs` (at
            all of them), `aux`; for a level with levels below it and for a top level also `gradient_norm` and `stats` (by
            lower level) of the last update's hypergradient.

        Raises:
            FuncmloError: the state, a batch, a loss's value or a response's answer is not as expected, or something
                is no longer finite. The state that came in is still good.
        """
        work = self._begin(self.graph.levels, state, batches, pure=False)
        with _unchanged(state, batches), torch.no_grad(), precision.apart():
            for loop in self._schedule.tops:
                work.run(loop)
            if isinstance(work, Walk):
                work.finish()
        finite.check(work.events, work.levels)
        return work.state, {name: metrics for name in self.graph.levels if (metrics := self._metrics(name, work))}

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True, with_stats: bool = False
    ) -> Any:
        """Return the (first) gradient that `step` would give level `of`'s optimizer; nothing is updated.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch or a function from the level's step number to a batch; levels that make no
                update before this one's first can be left out.
            of: the level's name.
            solve: whether the lower levels make their inner steps first; without, the state's parameters are taken
                as their solutions.
            with_stats: whether to return the stats of the best-response products too.

        Returns:
            A tree like the level's parameters, or (that tree, stats by lower level).

        Raises:
            FuncmloError: as for `step`; besides, an iterator is refused.
        """
        before, own, running = self._ahead(of, solve)
        solved = [name for name in self.graph.levels if of in self._users[name]]
        work = self._begin(running | {*solved}, state, batches, pure=True, solve=solve)
        with _unchanged(state, batches), torch.no_grad(), precision.apart():
            _advance(work, before)
            if isinstance(work, Nest):
                folded = work.hypergradient(of, begin=solve and own.steps > 0)
            else:
                folded = work.hypergradient(of, own if solve else None, solved)
        finite.check(work.events, work.levels)
        return (folded.gradient, folded.plain_stats()) if with_stats else folded.gradient

    def cost(self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True) -> Tensor:
        """Return the cost that level `of` would pay at its next update in `step`; nothing is updated.

        As a function of `state.params[of]` it is what `hypergradient` is the derivative of, where the response is exact; a
        level with `maximize=True` has its cost with the sign of its loss, and its hypergradient with the other one.

        Args:
            state: where the program stands; it is not changed.
            batches: as for `hypergradient`.
            of: the level's name.
            solve: whether the lower levels make their inner steps first.

        Returns:
            The cost, a 0-d tensor.

        Raises:
            FuncmloError: as for `hypergradient`.

        Example:
            One step of rate 1/2 from 0 takes y to 1/2, which costs (1/2 − 1)²:

            >>> import torch, torchopt, funcmlo as fm
            >>> program = Multilevel(
            ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=fm.ITD()),
            ...     fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.1)),
            ... )
            >>> program.cost(program.init({"y": torch.zeros(()), "x": torch.ones(())}), {}, of="x")
            tensor(0.2500)
        """
        before, own, running = self._ahead(of, solve)
        work = self._begin(running, state, batches, pure=True, solve=solve)
        if isinstance(work, Walk):  # nothing is kept of the loops for a derivative that is not taken
            work.users = {name: [user for user in users if user != of] for name, users in work.users.items()}
        with _unchanged(state, batches), torch.no_grad(), precision.apart():
            _advance(work, before)
            if isinstance(work, Nest):
                cost = work.cost(of, begin=solve and own.steps > 0)
            else:
                cost = work.cost(of, own if solve else None)
        finite.check(work.events, work.levels)
        return -cost if {level.name: level for level in self.levels}[of].maximize else cost

    def __repr__(self) -> str:
        """List the levels, lowest first."""
        return f"Multilevel({', '.join(self.graph.levels)})"

    def _ahead(self, of: str, solve: bool) -> tuple[tuple[Loop | str, ...], Loop, set[str]]:
        """What precedes the first loop of a level, that loop, and the levels that run before its first update."""
        self.graph.check(of)
        before, own = self._schedule.before(of) if solve else ((), Loop(of, 1))
        loops = [item for item in (*before, *own.first) if isinstance(item, Loop)]
        return before, own, {of}.union(*(loop.levels() for loop in loops))

    def _begin(
        self, running: Collection[str], state: State, batches: Mapping[str, Any], *, pure: bool, solve: bool = True
    ) -> Walk | Nest:
        """Check what came in, before anything runs, and set out with the feeds of the levels that will run."""
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
        feed = feeds([levels[name] for name in running], self.graph.levels, batches, state.step, pure=pure, tasks=self.tasks)
        if self.composition == "nested":
            return Nest(levels, self._needs, self._below, self.tasks, feed, state, solve)
        several = {name for name, users in self._keepers.items() if len(users) > 1}
        return Walk(levels, self.graph, self._users, several, self.tasks, feed, state)

    def _metrics(self, name: str, work: Walk | Nest) -> dict[str, Any]:
        """What `step` tells about a level."""
        outcome = work.outcomes.get(name)
        if outcome is None or not outcome.costs:
            return {}
        sign = -1 if work.levels[name].maximize else 1
        metrics: dict[str, Any] = {"cost": sign * outcome.costs[-1], "costs": sign * torch.stack(list(outcome.costs))}
        metrics["aux"] = outcome.aux
        if outcome.folded is not None:
            metrics |= {"gradient_norm": _tree.norm(outcome.folded.gradient), "stats": outcome.folded.plain_stats()}
        return metrics


def _advance(work: Walk | Nest, before: Sequence[Loop | str]) -> None:
    for item in before:
        work.begin(item) if isinstance(item, str) else work.run(item)


def _unchanged(state: State, batches: Mapping[str, Any]) -> AbstractContextManager[None]:
    watched = {f"the parameters of level '{name}' were": tree for name, tree in state.params.items()}
    watched |= {f"the buffers of level '{name}' were": tree for name, tree in state.buffers.items()}
    fixed = {name: batch for name, batch in batches.items() if not (callable(batch) or isinstance(batch, Iterator))}
    watched |= {f"the batch of level '{name}' was": batch for name, batch in fixed.items()}
    return untouched(watched, "The numbers that came in are changed now.")


def _highest_first(order: Sequence[str], names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in reversed(order) if name in names)
