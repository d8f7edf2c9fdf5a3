"""The truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_iterations
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """H⁻¹v ≈ α Σ_{k=0}^{K} (I − αH)^k v: K products, K + 1 terms.

    The series converges where 0 < α < 2/λ_max for a positive definite H. Its residual is known one term late: the
    stats give ‖(I − αH)^K v‖ / ‖v‖, the residual of the first K terms, and call it converged when it fell below `tol`.

    Args:
        iterations: K.
        scale: α, of the order of 1/λ_max; the inner learning rate is the usual choice.
        tol: the relative residual at which the stats say «converged»; all K terms are summed in any case.

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
    scale: float
    tol: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_iterations("Neumann", self.iterations)
        if not 0 < self.scale < math.inf:
            raise DefinitionError(
                f"Neumann(scale={self.scale!r}): expected a positive number below 2/λ_max; the inner learning rate "
                "is the usual choice."
            )
        if not self.tol >= 0:
            raise DefinitionError(f"Neumann(tol={self.tol!r}): expected a number that is not negative.")

    exact: ClassVar[bool] = False
    knob: ClassVar[str | None] = "iterations"

    def compute(self, operator: Operator, prepared: None, rhs: Tree, start: None) -> Solution:
        """Sum the series.

        Args:
            operator: H.
            prepared: nothing.
            rhs: v.
            start: not used.

        Returns:
            w with its statistics.
        """
        del prepared, start
        term = total = rhs
        for _ in range(self.iterations):
            term = _tree.add_scaled(term, -self.scale, operator(term))
            total = _tree.add(total, term)
        v_norm, rest = _tree.norm(rhs), _tree.norm(term)
        residual = torch.where(v_norm > 0, rest / torch.where(v_norm > 0, v_norm, 1), 0)
        return Solution(
            value=_tree.scale(self.scale, total),
            iterations=self.iterations,
            residual=residual,
            converged=residual <= self.tol,
            negative_curvature=torch.zeros_like(residual, dtype=torch.bool),
        )
