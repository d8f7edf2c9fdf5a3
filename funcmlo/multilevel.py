"""`Multilevel`: a program of levels; state in, state out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from funcmlo import _diff, _tree, finite, unroll
from funcmlo._tree import Tree
from funcmlo.batches import Feed, feeds
from funcmlo.errors import (
    DefinitionError,
    EstimatorError,
    FuncmloWarning,
    ParameterError,
    listing,
)
from funcmlo.fold import Folded, total_gradient
from funcmlo.graph import Graph, doubts
from funcmlo.initial import first_state
from funcmlo.level import Level
from funcmlo.purity import untouched
from funcmlo.state import State
from funcmlo.unroll import Problem, Run


class Multilevel:
    """A program of levels, lowest first: pure functions from state to state.

    Args:
        *levels: one or two levels, the lowest first.
        composition: `"paths"`, the products along the graph's paths.

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

    def __init__(self, *levels: Level, composition: Literal["paths"] = "paths") -> None:
        if not levels or not all(isinstance(level, Level) for level in levels):
            came = listing(type(level).__name__ for level in levels)
            raise DefinitionError(f"Multilevel takes Level objects, lowest first; {came} came.")
        if len(levels) > 2:
            raise DefinitionError(f"Multilevel carries one or two levels yet; {len(levels)} came.")
        if composition != "paths":
            raise DefinitionError(f"composition={composition!r} is not carried yet; expected 'paths'.")
        top = levels[-1]
        if top.steps != 1 or top.init is not None:
            raise DefinitionError(
                f"level '{top.name}' is the top level, which makes one update for each call of step: leave out its steps "
                "(call step again) and its init (pass its parameters to program.init)."
            )
        self.levels = levels
        self.composition = composition
        self.graph = Graph.of(levels)
        for warning in doubts(levels, self.graph):
            warnings.warn(warning, FuncmloWarning, stacklevel=2)

    def init(self, params: Mapping[str, Tree], *, buffers: Mapping[str, Tree] | None = None, seed: int = 0) -> State:
        """Return the program's first state.

        Args:
            params: each level's parameters, trees of floating-point tensors, which are copied. A level with `init=` may
                be left out.
            buffers: not carried yet; must be empty.
            seed: the integer from which all randomness follows.

        Returns:
            The state before the first step.

        Raises:
            ParameterError: a level's parameters are missing, unknown, or no tree of floating-point tensors.
        """
        return first_state(self.levels, params, buffers or {}, seed)

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, dict[str, dict[str, Any]]]:
        """Make one outer step: each lower level's `steps` updates, then one update of the top level.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch, an iterator (one batch per update) or a function from the level's
                step number to a batch.

        Returns:
            The new state, and metrics by level: `cost` (at the last update, before it), `aux`, and for a lower level
            `costs` (all inner steps), for the top level `gradient_norm` and `stats` (by lower level).

        Raises:
            FuncmloError: the state, a batch, a loss's value or a response's answer is not as expected, or something
                is no longer finite. The state that came in is still good.
        """
        feed = self._begin(self.levels, state, batches, pure=False)
        with untouched(state), torch.no_grad():
            runs = {level.name: self._run(level, state, feed, level.steps) for level in self.levels[:-1]}
            state = self._after(state, runs)
            top = self.levels[-1]
            problem = self._problem(top, state, feed)
            folded = self._fold(top, problem, state, runs)
            inputs = {name: state.params[name] for name in top.reads_levels}
            params, optimizer = problem.apply(state.params[top.name], state.optimizer[top.name], inputs, folded.gradient)
            new = replace(
                state,
                params={**state.params, top.name: params},
                optimizer={**state.optimizer, top.name: optimizer},
                response={**state.response, **folded.response},
                step={**state.step, top.name: state.step[top.name] + 1},
            )
        if not _diff.transforming():
            finite.check(top.name, runs, folded, new.params[top.name])
        metrics = {
            name: {
                "cost": _signed(self._level(name), run.costs[-1]),
                "costs": _signed(self._level(name), torch.stack(run.costs)),
                "aux": run.aux,
            }
            for name, run in runs.items()
            if run.costs
        }
        metrics[top.name] = {
            "cost": _signed(top, folded.cost),
            "aux": folded.aux,
            "gradient_norm": _tree.norm(folded.gradient),
            "stats": folded.plain_stats(),
        }
        return new, metrics

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True, with_stats: bool = False
    ) -> Any:
        """Return the gradient that `step` would give level `of`'s optimizer; nothing is updated.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch or a function from the level's step number to a batch.
            of: the level's name.
            solve: whether the lower levels make their inner steps first; without, the state's parameters are taken
                as their solutions.
            with_stats: whether to return the stats of the best-response products too.

        Returns:
            A tree like the level's parameters, or (that tree, stats by lower level).

        Raises:
            FuncmloError: as for `step`; besides, an iterator is refused.
        """
        self.graph.check(of)
        level = self._level(of)
        lower = self.levels[: self.levels.index(level)]
        feed = self._begin((*lower, level), state, batches, pure=True)
        with untouched(state), torch.no_grad():
            runs = {below.name: self._run(below, state, feed, below.steps if solve else 0) for below in lower}
            state = self._after(state, runs)
            problem = self._problem(level, state, feed)
            if level is not self.levels[-1]:
                inputs = {name: state.params[name] for name in level.reads_levels}
                begin = problem.start(inputs, state.params[of], state.optimizer[of])[0] if solve else state.params[of]
                state = replace(state, params={**state.params, of: begin})
            folded = self._fold(level, problem, state, runs)
        if not _diff.transforming():
            finite.check(of, runs, folded, None)
        return (folded.gradient, folded.plain_stats()) if with_stats else folded.gradient

    def __repr__(self) -> str:
        """List the levels, lowest first."""
        return f"Multilevel({', '.join(self.graph.levels)})"

    def _begin(self, levels: Sequence[Level], state: State, batches: Mapping[str, Any], *, pure: bool) -> dict[str, Feed]:
        """Check what came in, before anything runs, and return the feeds of the levels that will run."""
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
        if _diff.differentiating():
            raise EstimatorError(
                "step and hypergradient cannot be differentiated (torch.func.grad, vjp or jvp is active); differentiate "
                "an ordinary function of the parameters instead."
            )
        return feeds(levels, self.graph.levels, batches, state.step, pure=pure)

    def _level(self, name: str) -> Level:
        return self.levels[self.graph.levels.index(name)]

    def _problem(self, level: Level, state: State, feed: Mapping[str, Feed]) -> Problem:
        return Problem(level, feed[level.name], state.seed, state.step[level.name])

    def _run(self, level: Level, state: State, feed: Mapping[str, Feed], steps: int) -> Run:
        inputs = {name: state.params[name] for name in level.reads_levels}
        problem = self._problem(level, state, feed)
        return unroll.run(problem, state.params[level.name], state.optimizer[level.name], inputs, steps)

    def _after(self, state: State, runs: Mapping[str, Run]) -> State:
        """The state with the inner loops' ends in it."""
        return replace(
            state,
            params={**state.params, **{name: run.solved.params for name, run in runs.items()}},
            optimizer={**state.optimizer, **{name: run.solved.opt_state for name, run in runs.items()}},
            step={**state.step, **{name: state.step[name] + run.solved.steps for name, run in runs.items()}},
        )

    def _fold(self, level: Level, problem: Problem, state: State, runs: Mapping[str, Run]) -> Folded:
        solved = {name: (self._level(name).response, run.solved) for name, run in runs.items()}
        return total_gradient(self.graph, problem, state.params, solved, state.response)


def _signed(level: Level, cost: Tensor) -> Tensor:
    """The cost as the loss returned it."""
    return -cost if level.maximize else cost
