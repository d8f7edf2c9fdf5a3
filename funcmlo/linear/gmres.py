"""The generalized minimal residual method."""

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
from funcmlo.linear.checks import check_iterations
from funcmlo.linear.krylov import Krylov
from funcmlo.operators import Operator, ravel, unravel


@dataclass(frozen=True)
class GMRES(Krylov):
    """The w of least ‖v − (H + λI)w‖ in span{v, Hv, …, H^(K−1) v}, for any H, symmetric or not.

    It keeps an orthonormal basis of that space, restart · p numbers in at least float32, and starts anew when that is
    full; a cycle that gains nothing is the last. It is preconditioned from the right: H M⁻¹u = v, w = M⁻¹u, so its
    residual is the system's own.

    Args:
        iterations: the most iterations, one product with H each (a warm start costs one more).
        tol: stop when ‖v − Hw‖ ≤ tol · ‖v‖; never less than two machine epsilons. In float32 and below one product more
            tells the true residual, which an ill-conditioned H lets drift away from the recursion's.
        damping: λ ≥ 0.
        preconditioner: a map r ↦ M⁻¹r on trees, or what makes one from H; None for the identity.
        restart: how many vectors are kept; None for as many as there are iterations, at most 50.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> h, v = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([3.0, 4.0])
        >>> solution = GMRES(2).solve(Operator(lambda u: h @ u, like=v, symmetric=False), v)
        >>> solution.value, solution.products
        (tensor([1.0000, 2.0000]), 3)

    References:
        Saad and Schultz 1986, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems.
    """

    restart: int | None = None

    assumes: ClassVar[frozenset[Assumption]] = frozenset({"nonsingular"})

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if self.restart is not None:
            check_iterations("GMRES", self.restart, "restart")

    def compute(self, operator: Operator, prepared: Callable[[Tree], Tree], rhs: Tree, start: Tree) -> Solution:
        """Solve (H + λI) w = v; no iteration depends on data under a torch.func transform or on a GPU.

        Args:
            operator: H.
            prepared: the preconditioner.
            rhs: v.
            start: where to go on from, at one product more.

        Returns:
            w with its statistics; a zero v gives zero at once.
        """
        product, small = damped(operator, self.damping), rounding(rhs)
        target = max(self.tol, 2 * _tree.coarsest_epsilon(rhs))
        v, v_norm, active = normalized(rhs)
        x, r = _tree.zeros_like(rhs), ravel(v)
        if start is not None:
            x, residual = begin(product, v, start)
            r = ravel(residual)
        r_norm = _tree.norm(r)
        active = active & (r_norm > target)
        iterations = torch.zeros_like(v_norm, dtype=torch.int64)

        def right(q: Tensor) -> Tensor:
            return ravel(product(prepared(unravel(q, rhs))))

        remaining = self.iterations
        while remaining > 0 and not may_stop(active):
            steps = min(remaining, self.restart or _MOST_KEPT)
            basis, columns, done = _cycle(right, r, r_norm, active, steps, target, small)
            u, r, new_norm = _least(basis, columns, r_norm, active, small)
            x = _tree.where(active, _tree.add(x, prepared(unravel(u, rhs))), x)
            # A cycle depends on its r alone, so that one without a gain would be followed by the same again.
            active = active & (new_norm > target) & (new_norm < (1 - small) * r_norm)
            r_norm, iterations = new_norm, iterations + done
            remaining -= len(columns)

        w = _tree.scale(v_norm, x)
        residual, converged = attained(product, v, x, r_norm, target)
        return Solution(w, iterations, residual, converged, torch.zeros_like(active), carry=w)


_MOST_KEPT = 50


def _cycle(
    product: Callable[[Tensor], Tensor],
    r: Tensor,
    r_norm: Tensor,
    active: Tensor,
    steps: int,
    target: float,
    small: float,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Arnoldi's steps from the residual r: the basis, the columns of H̄, and how many steps counted."""
    basis = (r / torch.where(active, r_norm, 1))[None]  # Q_k, a row a vector: H Q_kᵀ = Q_{k+1}ᵀ H̄_k
    columns: list[Tensor] = []  # of H̄, upper Hessenberg
    # ω spans the left null space of H̄, and ‖r‖ = β/‖ω‖ for ω₀ = 1 (Ayachour 2003): a watch that costs one dot product.
    omega = torch.ones_like(r_norm)[None]
    live, done = active, torch.zeros_like(active, dtype=torch.int64)
    for _ in range(steps):
        if may_stop(live):
            break
        a = product(basis[-1])
        size = _tree.norm(a)
        h = basis @ a
        a = a - h @ basis
        again = basis @ a  # Gram and Schmidt twice is as orthogonal as rounding allows
        a, h = a - again @ basis, h + again
        beta = _tree.norm(a)
        broken = beta <= small * size  # the space holds its own image; not for NaN
        beta = torch.where(broken, 0, beta)
        inverse = torch.where(broken, 0, 1 / torch.where(broken, 1, beta))
        columns.append(torch.where(live, torch.cat([h, beta[None]]), 0))
        omega = torch.cat([omega, -(omega @ h)[None] * inverse])
        basis = torch.cat([basis, torch.where(live, a * inverse, 0)[None]])
        done = done + live
        live = live & ~broken & ~(r_norm <= target * torch.linalg.vector_norm(omega))
    return basis, columns, done


def _least(
    basis: Tensor, columns: list[Tensor], r_norm: Tensor, active: Tensor, small: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The y of least ‖βe₁ − H̄y‖, as the correction u = Qᵀy, the new residual and its norm."""
    k = len(columns)
    wide = r_norm.dtype if r_norm.device.type == "mps" else torch.float64  # that device has no float64
    padded = [torch.cat([c, torch.zeros_like(c[:1]).expand(k + 1 - len(c))]) for c in columns]
    hessenberg = torch.stack(padded, dim=1).to(wide)
    sound = torch.isfinite(hessenberg).all()
    left, sigma, right = torch.linalg.svd(torch.where(sound, hessenberg, 0), full_matrices=False)
    # Singular values that are rounding count as zero.
    kept = sigma > small * sigma.amax()
    inverse = torch.where(kept, 1 / torch.where(kept, sigma, 1), 0)
    beta = r_norm.to(wide)
    y = right.T @ (inverse * (left[0] * beta))
    y = torch.where(sound, y, torch.nan)  # what was NaN or infinite must show
    rest = torch.cat([beta[None], torch.zeros_like(y)]) - hessenberg @ y
    y, rest = y.to(basis.dtype), torch.where(active, rest, 0).to(basis.dtype)
    return y @ basis[:-1], rest @ basis, torch.where(active, _tree.norm(rest), r_norm)
