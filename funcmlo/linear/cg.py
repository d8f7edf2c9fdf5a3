"""Conjugate gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError
from funcmlo.linear.base import LinearSolver, Solution, check_iterations
from funcmlo.operators import Operator


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradient on (H + λI) w = v, for symmetric H that is positive definite where it is looked at.

    It stops, and says so, at a direction p of zero or negative curvature (pᵀHp ≤ 0 to rounding): it keeps the iterate
    that it has, or, at the first step, takes p itself, as an identity inverse would (Nocedal and Wright, alg. 7.1).

    Args:
        iterations: the most products with H.
        tol: stop when ‖v − Hw‖ ≤ tol · ‖v‖; never less than two machine epsilons. The residual is the recursion's own:
            where H is ill-conditioned for the dtype, the true one is larger.
        damping: λ ≥ 0.
        preconditioner: a symmetric positive definite map r ↦ M⁻¹r on trees; None for the identity.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> h, v = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([5.0, 5.0])
        >>> solution = CG(2).solve(Operator(lambda u: h @ u, like=v), v)
        >>> solution.value, solution.products
        (tensor([1.0000, 2.0000]), 2)

    References:
        Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, arXiv 1602.02355, and Rajeswaran et al. 2019,
        arXiv 1909.04630.
    """

    iterations: int
    tol: float = 1e-10
    damping: float = 0.0
    preconditioner: Callable[[Tree], Tree] | None = None

    symmetric_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_iterations("CG", self.iterations)
        if not (self.tol >= 0 and 0 <= self.damping < math.inf):
            raise DefinitionError(f"CG(tol={self.tol!r}, damping={self.damping!r}): expected numbers that are not negative.")
        if self.preconditioner is not None and not callable(self.preconditioner):
            raise DefinitionError(
                f"CG(preconditioner={self.preconditioner!r}): expected a function from a tree to a tree, or None."
            )

    def solve(self, operator: Operator, rhs: Tree) -> Solution:
        """Solve (H + λI) w = v; no iteration depends on data under a torch.func transform or on a GPU.

        Args:
            operator: H, symmetric.
            rhs: v.

        Returns:
            w with its statistics; a zero v gives zero at once.

        Raises:
            EstimatorError: H is not symmetric.
        """
        if not operator.symmetric:
            raise EstimatorError(
                "CG solves symmetric systems, and this one (a fixed point's I − ∂Φ) is not; use Neumann(…, scale=1.0), "
                "which sums the map's own powers, or Direct()."
            )
        epsilon = _tree.coarsest_epsilon(rhs)
        rounding = min(_FLAT * epsilon, epsilon**0.75)
        target = max(self.tol, 2 * epsilon)
        # On v/‖v‖, so that no product of norms under- or overflows; a v whose 1/‖v‖ overflows counts as zero.
        v_norm = _tree.norm(rhs)
        active = v_norm > torch.finfo(v_norm.dtype).tiny
        r = _tree.scale(1 / torch.where(active, v_norm, 1), rhs)
        x, r_norm = _tree.zeros_like(rhs), torch.where(active, 1.0, 0.0).to(v_norm.dtype)
        p = z = self._precondition(r)
        rz = _tree.dot(r, z)
        steepest = torch.zeros_like(v_norm)  # the largest ‖Hp‖ / ‖p‖ seen, an estimate of ‖H‖
        iterations = torch.zeros_like(v_norm, dtype=torch.int64)
        negative = torch.zeros_like(active)
        products = 0

        for k in range(self.iterations):
            if _may_stop(active):
                break
            hp = operator(p) if not self.damping else _tree.add_scaled(operator(p), self.damping, p)
            products += 1
            curvature, length = _tree.dot(p, hp), _tree.dot(p, p)
            steepest = torch.maximum(steepest, torch.where(active, _tree.norm(hp) / length.sqrt(), 0))
            flat = active & (curvature <= rounding * steepest * length)  # not for NaN, which goes on into x
            if k == 0:
                iterations = iterations + flat
                x, r = _tree.where(flat, p, x), _tree.where(flat, _tree.subtract(r, hp), r)
                r_norm = torch.where(flat, _tree.norm(r), r_norm)
            negative, active = negative | flat, active & ~flat

            alpha = torch.where(active, rz / torch.where(active, curvature, 1), 0)
            x, r = _tree.add_scaled(x, alpha, p), _tree.add_scaled(r, -alpha, hp)
            iterations = iterations + active
            r_norm = torch.where(active, _tree.norm(r), r_norm)
            z = self._precondition(r)
            rz_new = _tree.dot(r, z)
            beta = torch.where(active, rz_new / torch.where(active, rz, 1), 0)
            p, rz = _tree.add_scaled(z, beta, p), rz_new
            active = active & (r_norm > target)

        return Solution(_tree.scale(v_norm, x), products, iterations, r_norm, (r_norm <= target) & ~negative, negative)

    def _precondition(self, r: Tree) -> Tree:
        return r if self.preconditioner is None else self.preconditioner(r)


# Curvature pᵀHp/pᵀp below this many epsilons of ‖H‖ is rounding (in half precision: below ε^¾): a product carries a
# few, and dividing by it would blow up what a singular system leaves in its null space.
_FLAT = 64


def _may_stop(active: torch.Tensor) -> bool:
    """Say whether to leave the loop: asking is free on a CPU, waits for a GPU, and is impossible for traced values."""
    return not _tracing.transforming() and active.device.type == "cpu" and not bool(active)
