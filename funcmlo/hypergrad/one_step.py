"""One-step differentiation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from funcmlo import _diff, _tree, optim
from funcmlo._tree import Tree
from funcmlo.curvature.cross import gradient
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.solved import Keep, Solved
from funcmlo.hypergrad.stats import Stats


@dataclass(frozen=True)
class OneStep(BestResponse):
    """Jᵀv ≈ (∂Φ/∂x)ᵀ v: the last inner step alone is differentiated, at the cost of one step.

    Exact where ∂Φ/∂y = 0 (Newton steps); else its relative error is about the contraction rate ρ of the steps, so it is
    for fast solvers, and a direction for others. Where no steps were made (`steps=0`, `solve=False`, a solution from
    elsewhere) one step more at the solution is differentiated: Jacobian-free
    backpropagation through an equilibrium.

    Example:
        A Newton step on (y − x)²/2 is y = x, whatever y was:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=OneStep()),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2), "x": torch.tensor([1.0, 2.0])})
        >>> program.hypergradient(state, {}, of="x")
        tensor([2., 4.])

    References:
        Bolte, Pauwels and Vaiter 2023, arXiv 2305.13768; Fung et al. 2022 (JFB), arXiv 2103.12803.
    """

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="step", assumes=frozenset())
    sees_step: ClassVar[bool] = True
    uses_optimizer: ClassVar[bool] = True

    def keep(self, steps: int) -> Keep:
        """Say which standings of an inner loop are to be kept: the one before the last step.

        Args:
            steps: the number of inner steps.

        Returns:
            That one.
        """
        return Keep(frozenset([steps - 1])) if steps else Keep()

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return (∂Φ/∂x)ᵀ v for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: an outside solver made the step.
        """
        t = solved.steps - 1
        before = solved.kept.get(t)
        parts, there = solved.parts, (solved.params, solved.opt_state)
        if parts is None and solved.condition is None:
            raise EstimatorError("OneStep differentiates the optimizer's step, and an outside solver has none; use AID(…).")

        def step(x: dict[str, Tree]) -> tuple[Tree, None]:
            if before is not None:
                return solved.update(*_tree.like(before, there), x, t)[0], None
            if parts is None:
                return solved.update(*there, x)[0], None
            y, s = there
            u, _ = parts.updates(y, s, x, gradient(solved, y, x), None)
            moved = optim.apply(y, u)
            excess = parts.excess(moved, x, None)
            return moved if excess is None else _tree.add(moved, excess), None

        products = _diff.with_vjp(step, [solved.inputs], lambda _, __, back: dict(back(cotangent)[0]))
        return products, state, Stats(steps=1)
