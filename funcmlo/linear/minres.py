"""The minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.linear.base import Solution, may_stop
from funcmlo.linear.beginning import attained, begin, damped, normalized, rounding
from funcmlo.linear.krylov import Krylov
from funcmlo.operators import Operator


@dataclass(frozen=True)
class MINRES(Krylov):
    """The w of least ‖v − (H + λI)w‖ in span{v, Hv, …, H^(K−1) v}, for symmetric H, indefinite or not.

    Lanczos' three-term recurrence, and one Givens rotation a step. With a preconditioner it is the norm ⟨r, M⁻¹r⟩^½ of
    the residual that is least. Where v is not in the range of a singular H it stops at a least-squares solution, and
    does not call it converged.

    Args:
        iterations: the most iterations, one product with H each (a warm start costs one more).
        tol: stop when ‖v − Hw‖ ≤ tol · ‖v‖; never less than two machine epsilons. In float32 and below one product more
            tells the true residual, which an ill-conditioned H lets drift away from the recursion's.
        damping: λ ≥ 0.
        preconditioner: a symmetric positive definite map r ↦ M⁻¹r on trees, or what makes one from H, such as
            `Nystrom(10)`; None for the identity.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> h, v = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 1.0])
        >>> solution = MINRES(2).solve(Operator(lambda u: h * u, like=v), v)
        >>> solution.value, solution.products
        (tensor([ 1.0000, -0.5000]), 3)

    References:
        Paige and Saunders 1975, Solution of sparse indefinite systems of linear equations; the residual's recursion is
        from Choi, Paige and Saunders 2011, arXiv 1003.4042.
    """

    symmetric_only: ClassVar[bool] = True
    assumes: ClassVar[frozenset[Assumption]] = frozenset({"nonsingular"})

    def compute(self, operator: Operator, prepared: Callable[[Tree], Tree], rhs: Tree, start: Tree) -> Solution:
        """Solve (H + λI) w = v; no iteration depends on data under a torch.func transform or on a GPU.

        Args:
            operator: H, symmetric.
            prepared: the preconditioner.
            rhs: v.
            start: where to go on from, at one product more.

        Returns:
            w with its statistics; a zero v gives zero at once.
        """
        product, small = damped(operator, self.damping), rounding(rhs)
        target = max(self.tol, 2 * _tree.coarsest_epsilon(rhs))
        v, v_norm, active = normalized(rhs)
        r = v
        x = zero = _tree.zeros_like(rhs)
        if start is not None:
            x, r = begin(product, r, start)
        r_norm = _tree.norm(r)
        active = active & (r_norm > target)
        iterations = torch.zeros_like(v_norm, dtype=torch.int64)

        # Lanczos, with M: H z_k = β_k u_{k−1} + α_k u_k + β_{k+1} u_{k+1}, z = M⁻¹u, ⟨u_i, z_j⟩ = δ_ij.
        u, z, phi_bar, indefinite = _unit(prepared, r)
        active = active & ~indefinite
        u_old, beta = zero, torch.zeros_like(v_norm)
        # Its tridiagonal matrix is made triangular by rotations (c, s): row k becomes γ_k, δ_{k+1}, ε_{k+2}.
        c, s, delta_bar, epsilon = -torch.ones_like(v_norm), beta, beta, beta
        d = d_old = zero  # the solution's directions, Z R⁻¹
        steepest = beta  # the longest column of the tridiagonal matrix, an estimate of ‖H‖

        for _ in range(self.iterations):
            if may_stop(active):
                break
            a = _tree.add_scaled(product(z), -beta, u_old)
            alpha = _tree.dot(z, a)
            u_old, a = u, _tree.add_scaled(a, -alpha, u)
            beta_old, (u, z_new, beta, bad) = beta, _unit(prepared, a)
            indefinite = indefinite | (active & bad)
            column = torch.hypot(torch.hypot(alpha, beta_old), beta)
            steepest = torch.maximum(steepest, torch.where(active, column, 0))

            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            epsilon_old, epsilon, delta_bar = epsilon, s * beta, -c * beta
            # φ_k · |(γ̄, δ̄)| = ‖Hr‖: nothing is to be gained where that is rounding (not for NaN, which goes on into x).
            active = active & ~(torch.hypot(gamma_bar, delta_bar) <= small * steepest)
            gamma = torch.where(active, torch.hypot(gamma_bar, beta), 1)
            c, s = gamma_bar / gamma, beta / gamma
            phi, phi_bar = c * phi_bar, s * phi_bar
            left = _tree.add_scaled(_tree.add_scaled(z, -epsilon_old, d_old), -delta, d)
            d_old, d, z = d, _tree.scale(1 / gamma, left), z_new

            x = _tree.where(active, _tree.add_scaled(x, phi, d), x)
            r = _tree.where(active, _tree.add_scaled(_tree.scale(s * s, r), -phi_bar * c, u), r)
            r_norm = torch.where(active, _tree.norm(r), r_norm)
            iterations = iterations + active
            active = active & (r_norm > target)

        w = _tree.scale(v_norm, x)
        residual, converged = attained(product, v, x, r_norm, target)
        return Solution(w, iterations, residual, converged & ~indefinite, indefinite, carry=w)


def _unit(preconditioner: Callable[[Tree], Tree], y: Tree) -> tuple[Tree, Tree, Tensor, Tensor]:
    """u, z = M⁻¹u and β with y = βu and ⟨u, z⟩ = 1, all zero for y = 0; and whether ⟨y, M⁻¹y⟩ < 0, which must not be."""
    length = _tree.norm(y)
    # On y/‖y‖, so that ⟨y, M⁻¹y⟩ does not underflow for a small H.
    u = _tree.scale(_inverse(length), y)
    z = preconditioner(u)
    square = _tree.dot(u, z)
    height = square.clamp(min=0).sqrt()
    inverse = _inverse(height)
    return _tree.scale(inverse, u), _tree.scale(inverse, z), length * height, square < -rounding(y) * _tree.norm(z)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 where that overflows."""
    zero = x <= torch.finfo(x.dtype).tiny  # not for NaN
    return torch.where(zero, 0, 1 / torch.where(zero, 1, x))
