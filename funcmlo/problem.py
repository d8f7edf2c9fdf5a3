"""A level with its batches and its randomness bound: its cost, its update, and where its inner loop begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _diff, _random, _tracing, _tree, optim
from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning, LossError, ParameterError, listing
from funcmlo.level import Level
from funcmlo.signature import BATCH, BUFFERS, Call


@dataclass(frozen=True)
class Problem:
    """A level with its batches and its randomness bound, so that everything is a function of parameters.

    Attributes:
        level: the level.
        feed: its batches by step.
        seed: the program's seed.
        first: the step that the level makes next, counted from its first step ever.
        fixed: what the loss reads and nothing is ever differentiated by: buffers as they are now, constant inputs.
    """

    level: Level
    feed: Feed
    seed: int
    first: int
    fixed: Mapping[str, Any] = field(default_factory=dict)

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
            returned = self.level.cost(params, {**self.fixed, **inputs}, batch)
        value, aux = _checked_cost(self.level.name, returned)
        return (-value if self.level.maximize else value), aux

    def after(self, aux: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
        """Return the problem with the level's buffers as an update left them.

        Args:
            aux: what the loss returned beside the cost.

        Returns:
            The problem, and the metrics alone.

        Raises:
            LossError: the loss reads buffers and did not return new ones, or other ones.
        """
        if not self.level.carries_buffers:
            return self, aux
        name = self.level.name
        if BUFFERS not in aux:
            raise LossError(
                f"level '{name}': its loss reads buffers, but returned no new ones; expected (cost, {{'buffers': new}}), "
                "with output, new = net(params, x, buffers=buffers)."
            )
        if difference := _tree.mismatch(self.fixed[BUFFERS], aux[BUFFERS]):
            raise LossError(f"level '{name}': the buffers that its loss returned and those it got differ: {difference}.")
        fixed = {**self.fixed, BUFFERS: _tree.detach(aux[BUFFERS])}
        return replace(self, fixed=fixed), {key: value for key, value in aux.items() if key != BUFFERS}

    def evaluate(self, call: Call, first: Tree, inputs: Mapping[str, Tree], t: int) -> Any:
        """Evaluate another function of the level's arguments, under the batch and the randomness of step first + t.

        Args:
            call: the function with what it reads.
            first: its first argument.
            inputs: the parameters of the levels that the level reads.
            t: the step's number within this call.

        Returns:
            What it returns.

        Raises:
            DefinitionError: it reads what the level does not.
        """
        step = self.first + t
        values = {**self.fixed, **inputs, **({BATCH: self.feed(step)} if self.level.takes_batch else {})}
        if unknown := [source for source in call.sources if source not in values]:
            raise DefinitionError(
                f"level '{self.level.name}': {compact(call.function)} reads {listing(map(repr, unknown))}, which the "
                f"level's loss does not; it can read {listing(values)}."
            )
        with _random.seeded(_random.step_seed(self.seed, self.level.name, step)):
            return call(first, values=values)

    def update(
        self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int, correction: Tree = None
    ) -> tuple[Tree, Tree, Tensor, Any]:
        """Make the level's step first + t.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.
            correction: what the level's hypergradient has besides its direct gradient; None for nothing.

        Returns:
            The new parameters, the new optimizer state, the cost before the step (of an outside solver: after it), and
            the loss's metrics.
        """
        if self.level.has_solver:
            return self._solve(params, opt_state, inputs, t)
        value, aux, (gradient,), (used,) = _diff.value_and_grads(lambda at: self.cost(at, inputs, t), [params])
        if not used and _tree.leaves(params):
            warnings.warn(
                f"level '{self.level.name}': its cost does not depend on its own parameters, so they only move by what "
                "the optimizer adds; is the first argument used, and outside torch.no_grad?",
                FuncmloWarning,
                stacklevel=2,
            )
        if correction is not None:
            gradient = _tree.add(gradient, correction)
        params, opt_state = self.apply(params, opt_state, inputs, gradient, t)
        return params, opt_state, value, aux

    def _solve(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Tensor, Any]:
        """Let the outside solver make the step."""
        batch = self.feed(self.first + t)
        with torch.no_grad(), _random.seeded(self._seed_of("solver", t)):
            try:  # on copies, because what leaves torch may be written to unseen
                found = _tracing.call_outside(self.level.solution, params, {**self.fixed, **inputs}, batch)
            except RuntimeError as error:
                if not _tracing.transforming():
                    raise
                why = str(error).splitlines()[0]
                raise EstimatorError(
                    f"level '{self.level.name}': its solver failed under a torch.func transform ({why}); one that "
                    "leaves torch cannot be mapped by vmap: call it in a loop."
                ) from error
            if difference := _tree.mismatch(params, found):
                raise ParameterError(
                    f"level '{self.level.name}': what its solver returned and its parameters differ: {difference}."
                )
            found = self._projected(_tree.detach(found), inputs, t)
        return found, opt_state, *self.cost(found, inputs, t)

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
        updates, opt_state = self.updates(params, opt_state, inputs, gradient)
        return self._projected(optim.apply(params, updates), inputs, t), opt_state

    def updates(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], gradient: Tree) -> tuple[Tree, Tree]:
        """Return what the level's optimizer makes of a gradient: the updates, which are to be added, and its new state.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            gradient: a tree like params.

        Returns:
            Updates and state.
        """
        updates, opt_state = self.optimizer(inputs).update(gradient, opt_state, params=params, inplace=False)
        return updates, opt_state

    def excess(self, params: Tree, inputs: dict[str, Tree], t: int) -> Tree:
        """Return P(y) − y for the level's projection P; None where there is none.

        Args:
            params: y.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.

        Returns:
            A tree like params, or None.
        """
        if self.level.project is None:
            return None
        # On a copy, because a projection may write to what it is given.
        return _tree.subtract(self._projected(_tree.map(torch.clone, params), inputs, t), params)

    def _projected(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> Tree:
        """The parameters kept in the level's set."""
        if self.level.project is None:
            return params
        with _random.seeded(self._seed_of("project", t)):
            projected = self.level.projected(params, {**self.fixed, **inputs})
        if difference := _tree.mismatch(params, projected):
            raise ParameterError(
                f"level '{self.level.name}': what project= returns and its parameters differ: {difference}."
            )
        return projected

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
            begin = self.level.starting_point({**self.fixed, **inputs})
        if difference := _tree.mismatch(params, begin):
            raise ParameterError(f"level '{self.level.name}': what init= returns and its parameters differ: {difference}.")
        return begin, self.optimizer(inputs).init(begin)

    def optimizer(self, inputs: Mapping[str, Tree]) -> GradientTransformation:
        """Return the level's optimizer at these inputs."""
        return self.level.optimizer_for({**self.fixed, **inputs})

    def _seed_of(self, what: str, t: int) -> int:
        """The seed of what a step draws besides its cost."""
        return _random.step_seed(self.seed, f"{self.level.name}.{what}", self.first + t)


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
