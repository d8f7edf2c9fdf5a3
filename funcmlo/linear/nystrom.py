"""The Nyström approximation of the inverse."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.beginning import normalized, rounding
from funcmlo.linear.checks import check_iterations, check_not_negative, check_positive, check_seed
from funcmlo.linear.preconditioner import Preconditioner
from funcmlo.operators import Operator, ravel, unravel


class Factors(NamedTuple):
    """Ĥ = UΛUᵀ, what is added to it, and what was met.

    Attributes:
        u: U, p × rank, UᵀU = I.
        eigenvalues: Λ ≥ 0, ascending.
        damping: ρ > 0, 0-d.
        negative: whether negative eigenvalues of H's part were taken as zero, 0-d.
    """

    u: Tensor
    eigenvalues: Tensor
    damping: Tensor
    negative: Tensor


@dataclass(frozen=True)
class Nystrom(LinearSolver, Preconditioner):
    """w = (Ĥ + ρI)⁻¹v with Ĥ = C M⁺ Cᵀ from `rank` random columns C = H[:, K] and their block M = C[K].

    The columns are computed once and serve every right-hand side. Ĥ is kept as UΛUᵀ with UᵀU = I, in which

        (Ĥ + ρI)⁻¹ v = U (Λ + ρ)⁻¹ Uᵀv + (v − UUᵀv) / ρ,

    because the form v/ρ − C (M + CᵀC/ρ)⁻¹ Cᵀv / ρ² loses its digits in float32 at small ρ. Of an indefinite H the
    negative eigenvalues of Ĥ are taken as zero, and the stats say `negative_curvature`.

    For a preconditioner, `CG(…, preconditioner=Nystrom(10))`, the columns are all that is paid. As a solver it spends
    one product more, for the residual ‖v − (H + ρI)w‖ / ‖v‖ of the true H: it is small only where H is close to its
    rank. Memory: U, rank · p numbers in at least float32.

    Args:
        rank: the number of columns; all p of them where there are fewer.
        damping: ρ > 0; None for the least positive eigenvalue of Ĥ, which suits a preconditioner (1 if there is none).
        seed: which columns are drawn (uniformly, without replacement).
        tol: the relative residual at which the stats say «converged».

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> v = torch.tensor([1.0, 1.0])
        >>> solution = Nystrom(2, damping=1.0).solve(Operator(lambda u: torch.tensor([1.0, 3.0]) * u, like=v), v)
        >>> solution.value, solution.products
        (tensor([0.5000, 0.2500]), 3)

    References:
        Hataya and Yamada 2023, arXiv 2302.09726; as a preconditioner Frangella, Tropp and Udell 2021, arXiv 2110.02820.
    """

    rank: int
    damping: float | None = None
    seed: int = 0
    tol: float = 1e-3

    symmetric_only: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    knob: ClassVar[str | None] = "rank"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        check_iterations("Nystrom", self.rank, "rank")
        if self.damping is not None:
            check_positive("Nystrom", damping=self.damping)
        check_seed("Nystrom", self.seed)
        check_not_negative("Nystrom", tol=self.tol)

    def prepare(self, operator: Operator) -> Factors:
        """Draw columns of H and factor what they span.

        Args:
            operator: H, symmetric.

        Returns:
            U, Λ and ρ, at `rank` products.
        """
        like = operator.like
        template = ravel(like)
        p = len(template)
        # Python's generator: it draws from p numbers without laying them out, and works inside of every map.
        chosen = random.Random(int(self.seed)).sample(range(p), min(self.rank, p))
        if not chosen:
            one = torch.ones((), dtype=template.dtype, device=template.device)
            rho = one if self.damping is None else one * self.damping
            return Factors(template[:, None][:, :0], template[:0], rho, torch.zeros_like(rho, dtype=torch.bool))
        c = torch.stack([ravel(operator(unravel(_basis(i, template), like))) for i in chosen], dim=1)
        u, eigenvalues, negative = _factor(c, chosen, rounding(like))
        if self.damping is not None:
            rho = torch.full_like(eigenvalues[-1], self.damping)
        else:
            positive = eigenvalues > 0
            least = torch.where(positive, eigenvalues, torch.inf).amin()
            rho = torch.where(positive.any(), least, 1)
        return Factors(u, eigenvalues, rho, negative)

    def compute(self, operator: Operator, prepared: Factors, rhs: Tree, start: None) -> Solution:
        """Apply the inverse, and look at the residual: one product.

        Args:
            operator: H.
            prepared: its factors.
            rhs: v.
            start: not used.

        Returns:
            w with its statistics.
        """
        del start
        v, v_norm, _ = normalized(rhs)
        x = _inverted(prepared, v)
        product = _tree.add_scaled(operator(x), prepared.damping, x)
        residual = _tree.norm(_tree.subtract(v, product))
        return Solution(
            value=_tree.scale(v_norm, x),
            iterations=prepared.u.shape[1],
            residual=residual,
            converged=residual <= self.tol,
            negative_curvature=prepared.negative,
        )

    def inverse(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return r ↦ (Ĥ + ρI)⁻¹ r, symmetric and positive definite.

        Args:
            operator: H, symmetric.

        Returns:
            The map, at `rank` products now and none later.
        """
        factors = self.prepare(operator)
        return lambda r: _inverted(factors, r)


def _factor(c: Tensor, chosen: list[int], small: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, Λ and whether Ĥ has negative eigenvalues, from C; what is below `small` of the largest is rounding."""
    sound = torch.isfinite(c).all()
    c = torch.where(sound, c, 0)  # the decompositions refuse NaN, which is put back below
    wide = c.dtype if c.device.type == "mps" else torch.float64  # that device has no float64
    m = torch.stack([c[i] for i in chosen]).to(wide)
    # M = V diag(μ) Vᵀ, so Ĥ = B S Bᵀ with B = C V |μ|^(−½) and the signs S; with B = QR the rest is small.
    mu, v = torch.linalg.eigh((m + m.T) / 2)
    kept = mu.abs() > small * mu.abs().amax()
    factor = torch.where(kept, torch.where(kept, mu.abs(), 1).rsqrt(), 0)
    q, r = torch.linalg.qr(c @ (v * factor).to(c.dtype))
    r = r.to(wide)
    eigenvalues, turn = torch.linalg.eigh((r * mu.sign()) @ r.T)
    # As many eigenvalues of Ĥ are negative as of M (Sylvester's law of inertia).
    negative = (kept & (mu < 0)).any()
    above = eigenvalues > small * eigenvalues.abs().amax()
    eigenvalues = torch.where(above, eigenvalues, 0)
    eigenvalues = torch.where(sound, eigenvalues, torch.nan)
    return q @ turn.to(c.dtype), eigenvalues.to(c.dtype), negative


def _inverted(factors: Factors, v: Tree) -> Tree:
    """(UΛUᵀ + ρI)⁻¹ v."""
    u, eigenvalues, rho, _ = factors
    flat = ravel(v)
    inside = u.T @ flat
    within = u @ (inside / (eigenvalues + rho))
    if u.shape[0] == u.shape[1]:
        return unravel(within, v)  # nothing is outside of all columns, and its rounding would be divided by ρ
    outside = flat - u @ inside
    # Once more: what rounding left of U in it would be divided by ρ.
    outside = outside - u @ (u.T @ outside)
    return unravel(within + outside / rho, v)


def _basis(i: int, template: Tensor) -> Tensor:
    """The i-th basis vector."""
    return (torch.arange(len(template), device=template.device) == i).to(template.dtype)
