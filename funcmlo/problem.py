"""A level with its batches and its randomness bound: its update, and where its inner loop begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _random, _tracing, _tree, optim, precision
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError, FuncmloWarning, ParameterError
from funcmlo.evaluation import Evaluation
from funcmlo.gradients import value_and_grads


@dataclass(frozen=True)
class Problem(Evaluation):
    """A level with its batches and its randomness bound, so that everything is a function of parameters."""

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
        gradient, value, aux = self.gradient(params, inputs, t, correction)
        params, opt_state = self.apply(params, opt_state, inputs, gradient, t)
        return params, opt_state, value, aux

    def gradient(
        self, params: Tree, inputs: dict[str, Tree], t: int, correction: Tree = None
    ) -> tuple[Tree, Tensor, dict[str, Any]]:
        """Return the gradient that the level's optimizer gets at step first + t.

        Args:
            params: the level's own parameters.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.
            correction: as for `update`.

        Returns:
            A tree like params, the cost, and the loss's metrics.
        """
        with precision.scaled(self.level.loss_scale):
            value, aux, (gradient,), (used,) = value_and_grads(self, lambda one, at: one.cost(at, inputs, t), [params], t)
        if not used and _tree.leaves(params):
            warnings.warn(
                f"level '{self.level.name}': its cost does not depend on its own parameters, so they only move by what "
                "the optimizer adds; is the first argument used, and outside torch.no_grad?",
                FuncmloWarning,
                stacklevel=2,
            )
        return gradient if correction is None else _tree.add(gradient, correction), value, aux

    def _solve(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Tensor, Any]:
        """Let the outside solver make the step."""
        if self.has_tasks:
            *standing, costs, aux = self.each(lambda one, x, *own: one._solve(*own, x, t), inputs, params, opt_state)
            return *standing, costs.sum(), aux
        batch = self.feed(self.first + t)
        with torch.no_grad(), _random.seeded(self.seed_of(".solver", t)):
            try:  # on copies, because what leaves torch may be written to unseen
                found = _tracing.call_outside(self.level.solution, params, {**self.fixed, **inputs}, batch)
            except RuntimeError as error:
                if not _tracing.transforming():
                    raise
                why = str(error).splitlines()[0]
                raise EstimatorError(
                    f"level '{self.level.name}': its solver failed under a torch.func transform ({why}); one that "
                    "leaves torch cannot be mapped by vmap: call it in a loop (of a level with tasks: chunk=1)."
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
        if self.has_tasks:
            own = (params, opt_state, gradient)
            new, opt_state = self.each(lambda one, x, y, s, g: one.apply(y, s, x, g, t), inputs, *own)
            return new, opt_state
        updates, opt_state = self.updates(params, opt_state, inputs, gradient)
        return self._projected(optim.apply(params, updates), inputs, t), opt_state

    def updates(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], gradient: Tree) -> tuple[Tree, Tree]:
        """Return what the level's optimizer makes of a gradient: the updates, which are to be added, and its new state."""
        updates, opt_state = self.optimizer(inputs).update(gradient, opt_state, params=params, inplace=False)
        return updates, opt_state

    def excess(self, params: Tree, inputs: dict[str, Tree], t: int) -> Tree:
        """Return P(y) − y for the level's projection P at y = params; None where there is none."""
        if self.level.project is None:
            return None
        # On a copy, because a projection may write to what it is given.
        return _tree.subtract(self._projected(_tree.map(torch.clone, params), inputs, t), params)

    def _projected(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> Tree:
        """The parameters kept in the level's set."""
        if self.level.project is None:
            return params
        with _random.seeded(self.seed_of(".project", t)):
            projected = self.level.projected(params, {**self.fixed, **inputs})
        if difference := _tree.mismatch(params, projected):
            raise ParameterError(
                f"level '{self.level.name}': what project= returns and its parameters differ: {difference}."
            )
        return projected

    def start(self, inputs: dict[str, Tree], params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
        """Return where the inner loop begins, and the optimizer's state there: where the level stands, or as `init` says."""
        if self.level.init is None:
            return params, opt_state
        if self.has_tasks:
            begin, opt_state = self.each(lambda one, x, *own: one.start(x, *own), inputs, params, opt_state)
            return begin, opt_state
        with _random.seeded(self.seed_of(".init", 0)):
            begin = self.level.starting_point({**self.fixed, **inputs})
        if difference := _tree.mismatch(params, begin):
            raise ParameterError(f"level '{self.level.name}': what init= returns and its parameters differ: {difference}.")
        return begin, self.optimizer(inputs).init(begin)

    def optimizer(self, inputs: Mapping[str, Tree]) -> GradientTransformation:
        """Return the level's optimizer at these inputs."""
        return self.level.optimizer_for({**self.fixed, **inputs})
