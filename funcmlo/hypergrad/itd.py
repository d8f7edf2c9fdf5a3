"""Iterative differentiation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats

NO_STEPS = (
    "ITD differentiates the inner steps, but none were made (steps=0 or solve=False); use AID, which needs the solution "
    "alone, or solve the lower level."
)


@dataclass(frozen=True)
class ITD(BestResponse):
    """Jᵀv by reverse mode through the inner steps y_{t+1} = Φ_t(y_t, s_t, x), the optimizer's state s_t in the graph.

    It is the exact derivative of the program that ran, converged or not, and the only estimator here that follows
    what the optimizer does: learning rates, momentum, clipping, projections, and where the inner loop starts.

    Cost: about one Hessian-vector product per inner step. Memory: the activations of all inner steps.

    Example:
        One step of gradient descent from 0 on (y − x)²/2 with rate 1/2 gives y = x/2:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=ITD()),
        ...     fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2), "x": torch.tensor([1.0, 2.0])})
        >>> program.hypergradient(state, {}, of="x")
        tensor([0.5000, 0.5000])

    References:
        Franceschi et al. 2017, arXiv 1703.01785; Finn et al. 2017, arXiv 1703.03400.
    """

    requires: ClassVar[Requires] = "trajectory"
    claims: ClassVar[Claims] = Claims(target="unrolled", differentiable=True)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return (∂y_T/∂x)ᵀ v for every input.

        Args:
            solved: the lower level at its solution, with its trajectory.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: no inner steps were recorded.
        """
        if solved.trajectory is None or not solved.steps:
            raise EstimatorError(NO_STEPS)
        return solved.trajectory.pullback(cotangent), state, Stats(steps=solved.steps)
