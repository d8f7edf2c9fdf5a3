"""The truncated Neumann series."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning
from funcmlo.linear.arithmetic import Arithmetic
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.beginning import rayleigh, rounding
from funcmlo.linear.checks import check_iterations, check_not_negative, check_seed, is_positive
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """H⁻¹v ≈ α Σ_{k=0}^{K} (I − αH)^k v: K products, K + 1 terms.

    The series converges where 0 < α < 2/λ_max for a positive definite H. Its residual is known one term late: the
    stats give ‖(I − αH)^K v‖ / ‖v‖, the residual of the first K terms, and call it converged when it fell below `tol`.

    The series is a power iteration too: the Rayleigh quotients ⟨t, Ht⟩ / ⟨t, t⟩ of its terms lie between the least and
    the largest eigenvalue of a symmetric H. One below zero (the stats' `negative_curvature`), or of at least 2/α,
    proves that the series diverges, and there is a warning outside of torch.func transforms. A sum is left at the terms
    it has when the next is larger than ‖v‖/ε; the residual is then that of the answer.

    Args:
        iterations: K.
        scale: α, of the order of 1/λ_max; the inner learning rate is the usual choice. None for 1/λ̂ of a symmetric H,
            where λ̂ ≤ |λ|_max comes from a power iteration: the series of a positive definite H converges if λ̂ found at
            least half of λ_max, the margin of 2 that α = 1/λ_max has.
        tol: the relative residual at which the stats say «converged»; all K terms are summed in any case.
        power_iterations: the products of that power iteration, once for all right-hand sides.
        seed: of its first vector.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> v = torch.tensor([1.0, 1.0])
        >>> Neumann(50, scale=0.5).solve(Operator(lambda u: torch.tensor([1.0, 2.0]) * u, like=v), v).value
        tensor([1.0000, 0.5000])

    References:
        Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590.
    """

    iterations: int
    scale: float | None = None
    tol: float = 1e-3
    power_iterations: int = 8
    seed: int = 0

    exact: ClassVar[bool] = False
    knob: ClassVar[str | None] = "iterations"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        check_iterations("Neumann", self.iterations)
        if self.scale is not None and not is_positive(self.scale):
            raise DefinitionError(
                f"Neumann(scale={self.scale!r}): expected a positive number below 2/λ_max; the inner learning rate "
                "is the usual choice, and None estimates 1/λ_max."
            )
        check_not_negative("Neumann", tol=self.tol)
        check_iterations("Neumann", self.power_iterations, "power_iterations")
        check_seed("Neumann", self.seed)

    def prepare(self, operator: Operator) -> float | Tensor:
        """Return α.

        Args:
            operator: H.

        Returns:
            The scale, or 1/λ̂ after `power_iterations` products.

        Raises:
            EstimatorError: α is to be estimated, and H is not symmetric.
        """
        if self.scale is not None:
            return self.scale
        if not operator.symmetric:
            raise EstimatorError(
                "Neumann(scale=None) estimates the largest eigenvalue of a symmetric H, and this system (a fixed point's "
                "I − ∂Φ) is not: give scale=1.0, which sums the map's own powers, or use GMRES(…)."
            )
        u = _random_like(operator.like, self.seed)
        top = torch.zeros((), dtype=_tree.precision(u))
        for _ in range(self.power_iterations):
            length = _tree.norm(u)
            some = length > torch.finfo(length.dtype).tiny
            u = operator(_tree.scale(torch.where(some, 1 / torch.where(some, length, 1), 0), u))
            top = torch.maximum(top.to(length.device), _tree.norm(u))
        return torch.where(top == 0, 1, 1 / torch.where(top == 0, 1, top))

    def compute(self, operator: Operator, prepared: float | Tensor, rhs: Tree, start: None) -> Solution:
        """Sum the series.

        Args:
            operator: H.
            prepared: α.
            rhs: v.
            start: not used.

        Returns:
            w with its statistics.
        """
        del start
        m = Arithmetic.of(rhs)
        epsilon, alpha = _tree.coarsest_epsilon(rhs), m.taken(prepared)
        term, spec = _tree.flatten(rhs)
        v_norm = length = m.norm(term)
        divisor = m.where(v_norm > 0, v_norm, 1)
        # A zero v is summed too, so that a product that is NaN there is seen.
        total, active = term, m.fill(True, v_norm, torch.bool)
        iterations, residual = m.fill(0, v_norm, torch.int64), length / divisor
        least = largest = m.fill(0.0, v_norm)  # of the quotients, times α

        for _ in range(self.iterations):
            if m.over(active):
                break
            product = _tree.leaves(operator(_tree.unflatten(spec, term)))
            if operator.symmetric:
                # A term that has shrunk to rounding says nothing of H; a mode that grows will be seen when it has.
                telling = active & (length > epsilon**0.5 * divisor)
                quotient = m.where(telling, alpha * rayleigh(term, product, length, m), 0)
                least, largest = m.smaller(least, quotient), m.larger(largest, quotient)
            term = m.add_scaled(term, -alpha, product, into=term)
            del product
            length = m.norm(term)
            residual = m.where(active, length / divisor, residual)
            active = active & ((residual > 1 / epsilon) ^ True)  # not for NaN, which goes on into the sum
            if m.over(active):
                break
            total = m.choose(active, m.add_scaled(total, 1, term, into=total), total)
            iterations = iterations + active

        # What is negative by no more than a product's rounding, on the scale 1/α of H, is not.
        negative = least < -rounding(rhs)
        if not _tracing.unreadable() and bool(negative | (largest >= 2)):
            doubt = _divergence(float(least / alpha), float(largest / alpha), float(alpha))
            warnings.warn(doubt, FuncmloWarning, stacklevel=2)
        return Solution(
            value=_tree.unflatten(spec, m.scale(alpha, total)),
            iterations=m.told(iterations),
            residual=m.told(residual),
            converged=m.told(residual <= self.tol),
            negative_curvature=m.told(negative),
        )


def _divergence(least: float, largest: float, alpha: float) -> str:
    """What there is to say about a series that must diverge."""
    if largest * alpha >= 2:
        return (
            f"Neumann(…, scale={alpha:.2g}) diverges: H has an eigenvalue of at least {largest:.2g}; the scale must be "
            f"below 2/λ_max ≤ {2 / largest:.2g}. Lower it, or leave it out to have it estimated."
        )
    return (
        f"Neumann(…, scale={alpha:.2g}) diverges: H has a negative eigenvalue, at most {least:.2g}, where no scale "
        "helps; add curvature to the lower cost (weight decay), or use CG(…, damping=…) or MINRES(…)."
    )


def _random_like(like: Tree, seed: int) -> Tree:
    """Independent normal numbers from a generator of their own, the same inside of every map."""
    leaves, structure = _tree.flatten(like)
    kinds = [(x.shape, x.device, x.dtype) for x in leaves]

    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape, device, dtype in kinds]

    return _tree.unflatten(structure, _tracing.call_outside(draw))
