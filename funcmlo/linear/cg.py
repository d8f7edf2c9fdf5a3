"""Conjugate gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.linear.arithmetic import Arithmetic, Scalar, Vector
from funcmlo.linear.base import Solution
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
        m = Arithmetic.of(rhs, start)
        flatness, target = rounding(rhs), max(self.tol, 2 * _tree.coarsest_epsilon(rhs))
        product = damped(operator, self.damping)
        v, v_norm, active = normalized(rhs, m)
        begun = (_tree.zeros_like(rhs), v) if start is None else begin(product, v, start)
        (x, spec), r = _tree.flatten(begun[0]), _tree.leaves(begun[1])
        del v, begun

        def reduced(r: Vector) -> tuple[Vector, Scalar, Scalar]:
            """M⁻¹r, ⟨r, M⁻¹r⟩ and ‖r‖."""
            if self.preconditioner is None:
                square = m.dot(r, r)
                return list(r), square, square**0.5
            z = _tree.leaves(prepared(_tree.unflatten(spec, r)))
            return z, m.dot(r, z), m.norm(r)

        fresh = start is None or m.norm(x) == 0
        p, rz, length = reduced(r)
        r_norm = m.where(active, length, 0)
        active = active & (fresh | ((r_norm <= target) ^ True))
        steepest = m.fill(0.0, v_norm)  # the largest ‖Hp‖ / ‖p‖ seen, an estimate of ‖H‖
        iterations, negative = m.fill(0, v_norm, torch.int64), m.fill(False, v_norm, torch.bool)

        for k in range(self.iterations):
            if m.over(active):
                break
            hp = _tree.leaves(product(_tree.unflatten(spec, p)))
            curvature, length = m.dot(p, hp), m.dot(p, p)
            steepest = m.larger(steepest, m.where(active, m.ratio(m.norm(hp), length**0.5), 0))
            flat = active & (curvature <= flatness * steepest * length)  # not for NaN, which goes on into x
            if k == 0:
                first = flat & fresh
                iterations = iterations + first
                x, r = m.choose(first, p, x), m.choose(first, _tree.subtract(r, hp), r)
                r_norm = m.where(first, m.norm(r), r_norm)
            negative, active = negative | flat, active & (flat ^ True)
            if m.over(active):
                break

            alpha = m.where(active, m.ratio(rz, m.where(active, curvature, 1)), 0)
            x, r = m.add_scaled(x, alpha, p, into=x), m.add_scaled(r, -alpha, hp, into=r)
            del hp  # x, r and p alone are held through a product
            iterations = iterations + active
            z, rz_new, length = reduced(r)
            r_norm = m.where(active, length, r_norm)
            beta = m.where(active, m.ratio(rz_new, m.where(active, rz, 1)), 0)
            p, rz = m.add_scaled(z, beta, p, into=p), rz_new
            del z
            active = active & (r_norm > target)

        del p, r
        w = _tree.unflatten(spec, m.scale(v_norm, x))
        converged = (r_norm <= target) & (negative ^ True)
        return Solution(w, m.told(iterations), m.told(r_norm), m.told(converged), m.told(negative), carry=w)
