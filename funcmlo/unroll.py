"""Running a level: its cost with batch and seed bound, its updates, its inner loop, recorded or not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcmlo import _diff, _random, _tree, optim
from funcmlo._tree import Tree
from funcmlo.batches import Feed, forget
from funcmlo.errors import FuncmloWarning, LossError, ParameterError
from funcmlo.hypergrad.base import Solved
from funcmlo.level import Level


@dataclass(frozen=True)
class Problem:
    """A level with its batches and its randomness bound, so that everything is a function of parameters.

    Attributes:
        level: the level.
        feed: its batches by step.
        seed: the program's seed.
        first: the step that the level makes next, counted from its first step ever.
    """

    level: Level
    feed: Feed
    seed: int
    first: int

    def cost(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the level's cost at step first + t, negated if it is maximized.

        Args:
            params: the level's own parameters.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.

        Returns:
            The cost to be minimized, a 0-d tensor, and the loss's metrics.
        """
        step = self.first + t
        batch = self.feed(step)
        with _random.seeded(_random.step_seed(self.seed, self.level.name, step)):
            returned = self.level.cost(params, inputs, batch)
        value, aux = _checked_cost(self.level.name, returned)
        return (-value if self.level.maximize else value), aux

    def update(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Tensor, Any]:
        """Make the level's step first + t.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.

        Returns:
            The new parameters, the new optimizer state, the cost before the step, and the loss's metrics.
        """
        value, aux, (gradient,), (used,) = _diff.value_and_grads(lambda at: self.cost(at, inputs, t), [params])
        if not used and _tree.leaves(params):
            warnings.warn(
                f"level '{self.level.name}': its cost does not depend on its own parameters, so they only move by what "
                "the optimizer adds; is the first argument used, and outside torch.no_grad?",
                FuncmloWarning,
                stacklevel=2,
            )
        params, opt_state = self.apply(params, opt_state, inputs, gradient, t)
        return params, opt_state, value, aux

    def apply(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], gradient: Tree, t: int = 0) -> tuple[Tree, Tree]:
        """Give a gradient to the level's optimizer and project what comes out.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            gradient: a tree like params.
            t: the step's number within this call.

        Returns:
            The new parameters and optimizer state.

        Raises:
            ParameterError: the projection changed the structure, a shape or a dtype.
        """
        optimizer = self.level.optimizer_for(inputs)
        updates, opt_state = optimizer.update(gradient, opt_state, params=params, inplace=False)
        new = optim.apply(params, updates)
        if self.level.project is not None:
            with _random.seeded(self._seed_of("project", t)):
                projected = self.level.project(new)
            if difference := _tree.mismatch(new, projected):
                raise ParameterError(
                    f"level '{self.level.name}': what project= returns and its parameters differ: {difference}."
                )
            new = projected
        return new, opt_state

    def start(self, inputs: dict[str, Tree], params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
        """Return where the inner loop begins: where the level stands, or where its `init` says.

        Args:
            inputs: the parameters of the levels that it reads.
            params: where the level stands.
            opt_state: its optimizer's state there.

        Returns:
            Parameters and optimizer state.

        Raises:
            ParameterError: `init` returned a tree unlike the level's parameters.
        """
        if self.level.init is None:
            return params, opt_state
        with _random.seeded(self._seed_of("init", 0)):
            begin = self.level.starting_point(inputs)
        if difference := _tree.mismatch(params, begin):
            raise ParameterError(f"level '{self.level.name}': what init= returns and its parameters differ: {difference}.")
        return begin, self.level.optimizer_for(inputs).init(begin)

    def _seed_of(self, what: str, t: int) -> int:
        """The seed of what a step draws besides its cost."""
        return _random.step_seed(self.seed, f"{self.level.name}.{what}", self.first + t)


@dataclass(frozen=True)
class Run:
    """What an inner loop gave: the solved level, and its costs for the metrics.

    Attributes:
        solved: the level at its solution.
        costs: the cost before each inner step, as the optimizer saw it.
        aux: the last step's metrics.
    """

    solved: Solved
    costs: list[Tensor]
    aux: Any


@dataclass(frozen=True)
class Recorded:
    """A trajectory: its states, and the graph behind the last one."""

    states: tuple[tuple[Tree, Tree], ...]
    _pullback: _diff.Pullback

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input."""
        (inputs,) = self._pullback(cotangent)
        return dict(inputs)


def run(problem: Problem, params: Tree, opt_state: Tree, inputs: dict[str, Tree], steps: int) -> Run:
    """Run a level's inner loop and hand over its solution.

    Args:
        problem: the level, bound.
        params: where the level stands.
        opt_state: its optimizer's state there.
        inputs: the parameters of the levels that it reads, plain values.
        steps: the number of updates; with 0 the level is taken to be solved where it stands.

    Returns:
        The solved level, recorded if its response requires a trajectory.
    """
    requires = problem.level.response.requires

    def loop(inputs: dict[str, Tree]) -> tuple[Tree, tuple[Any, ...]]:
        y, s = problem.start(inputs, params, opt_state) if steps else (params, opt_state)
        states: list[tuple[Tree, Tree]] = [(y, s)]
        costs: list[Tensor] = []
        aux: dict[str, Any] = {}
        for t in range(steps):
            y, s, cost, aux = problem.update(y, s, inputs, t)
            costs.append(cost)
            if requires == "trajectory":
                states.append((y, s))
            elif requires == "solution":
                forget(problem.feed, problem.first + t)
        return y, (s, tuple(states), costs, aux)

    if requires == "trajectory" and steps:
        y, (s, states, costs, aux), pullback = _diff.vjp(loop, [inputs])
        trajectory: Recorded | None = Recorded(states, pullback)
    else:
        with torch.no_grad():
            y, (s, states, costs, aux) = loop(inputs)
        trajectory = None

    # Without inner steps the last step ever made is the one whose batch and randomness are bound.
    last = steps - 1 if steps else (-1 if problem.first else 0)

    def loss(at: Tree, x: dict[str, Tree], draw: int | None = None) -> Tensor:
        return problem.cost(at, x, last if draw is None else last + 1 + draw)[0]

    def update(at: Tree, state: Tree, x: dict[str, Tree], t: int) -> tuple[Tree, Tree]:
        return problem.update(at, state, x, t)[:2]

    solved = Solved(
        params=y,
        opt_state=s,
        inputs=inputs,
        init=states[0],
        steps=steps,
        loss=loss,
        update=update,
        start=lambda x: problem.start(x, params, opt_state),
        optimizer=problem.level.optimizer_for(inputs),
        trajectory=trajectory,
    )
    return Run(solved, costs, aux)


def _checked_cost(name: str, returned: Any) -> tuple[Tensor, dict[str, Any]]:
    """Split what a loss returned into cost and metrics, or say what is wrong with it."""
    value, aux = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(value, Tensor):
        raise LossError(
            f"level '{name}': its loss returned {type(value).__name__}; expected a scalar tensor, or "
            "(scalar, dict of metrics)."
        )
    if value.dim():
        raise LossError(
            f"level '{name}': its loss returned a tensor of shape {tuple(value.shape)}; expected a scalar: reduce it "
            "with .mean() or .sum()."
        )
    if not value.is_floating_point():
        raise LossError(f"level '{name}': its loss returned dtype {value.dtype}; expected a real floating-point scalar.")
    if not isinstance(aux, dict):
        raise LossError(
            f"level '{name}': its loss returned {type(aux).__name__} beside the cost; expected a dict of metrics."
        )
    return value, aux
