"""Conjugate gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.linear.base import Solution, may_stop
from funcmlo.linear.beginning import begin, damped, normalized, rounding
from funcmlo.linear.krylov import Krylov
from funcmlo.operators import Operator


@dataclass(frozen=True)
class CG(Krylov):
    """Conjugate gradient on (H + λI) w = v, for symmetric H that is positive definite where it is looked at.

    It stops, and says so, at a direction p of zero or negative curvature (pᵀHp ≤ 0 to rounding): it keeps the iterate
    that it has, or, at the first step, takes p itself, as an identity inverse would (Nocedal and Wright, alg. 7.1).

    Args:
        iterations: the most iterations, one product with H each (a warm start costs one more).
        tol: stop when ‖v − Hw‖ ≤ tol · ‖v‖; never less than two machine epsilons. The residual is the recursion's own:
            where H is ill-conditioned for the dtype, the true one is larger.
        damping: λ ≥ 0.
        preconditioner: a symmetric positive definite map r ↦ M⁻¹r on trees, or what makes one from H, such as
            `Nystrom(10)`; None for the identity.

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

    symmetric_only: ClassVar[bool] = True

    def compute(self, operator: Operator, prepared: Callable[[Tree], Tree], rhs: Tree, start: Tree) -> Solution:
        """Solve (H + λI) w = v; no iteration depends on data under a torch.func transform or on a GPU.

        Args:
            operator: H, symmetric.
            prepared: the preconditioner.
            rhs: v.
            start: where to go on from, at one product more; zero is taken instead where it is of no use.

        Returns:
            w with its statistics; a zero v gives zero at once.
        """
        flatness, target = rounding(rhs), max(self.tol, 2 * _tree.coarsest_epsilon(rhs))
        product = damped(operator, self.damping)
        r, v_norm, active = normalized(rhs)
        x = _tree.zeros_like(rhs)
        if start is not None:
            x, r = begin(product, r, start)
        fresh = _tree.norm(x) == 0
        r_norm = torch.where(active, _tree.norm(r), 0)
        active = active & (fresh | ~(r_norm <= target))
        p = z = prepared(r)
        rz = _tree.dot(r, z)
        steepest = torch.zeros_like(v_norm)  # the largest ‖Hp‖ / ‖p‖ seen, an estimate of ‖H‖
        iterations = torch.zeros_like(v_norm, dtype=torch.int64)
        negative = torch.zeros_like(active)

        for k in range(self.iterations):
            if may_stop(active):
                break
            hp = product(p)
            curvature, length = _tree.dot(p, hp), _tree.dot(p, p)
            steepest = torch.maximum(steepest, torch.where(active, _tree.norm(hp) / length.sqrt(), 0))
            flat = active & (curvature <= flatness * steepest * length)  # not for NaN, which goes on into x
            if k == 0:
                first = flat & fresh
                iterations = iterations + first
                x, r = _tree.where(first, p, x), _tree.where(first, _tree.subtract(r, hp), r)
                r_norm = torch.where(first, _tree.norm(r), r_norm)
            negative, active = negative | flat, active & ~flat

            alpha = torch.where(active, rz / torch.where(active, curvature, 1), 0)
            x, r = _tree.add_scaled(x, alpha, p), _tree.add_scaled(r, -alpha, hp)
            iterations = iterations + active
            r_norm = torch.where(active, _tree.norm(r), r_norm)
            z = prepared(r)
            rz_new = _tree.dot(r, z)
            beta = torch.where(active, rz_new / torch.where(active, rz, 1), 0)
            p, rz = _tree.add_scaled(z, beta, p), rz_new
            active = active & (r_norm > target)

        w = _tree.scale(v_norm, x)
        return Solution(w, iterations, r_norm, (r_norm <= target) & ~negative, negative, carry=w)
