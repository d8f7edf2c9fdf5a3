"""The dense oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_iterations
from funcmlo.operators import Operator, ravel, unravel


@dataclass(frozen=True)
class Direct(LinearSolver):
    """w = H⁺v from the dense matrix: p products and O(p³) work, for small problems and as a reference.

    A symmetric H is decomposed as H = QΛQᵀ; eigenvalues below p · ε · |λ|_max count as zero, so that a singular H
    gives the solution of least norm. An indefinite H is solved as it is.

    Args:
        max_size: the largest p that is accepted, so that a network is not laid out by mistake.

    Raises:
        DefinitionError: the limit is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> v = torch.tensor([1.0, 1.0])
        >>> Direct().solve(Operator(lambda u: torch.tensor([4.0, 0.0]) * u, like=v), v).value
        tensor([0.2500, 0.0000])
    """

    max_size: int = 20_000

    assumes: ClassVar[frozenset[Assumption]] = frozenset({"nonsingular"})

    def __post_init__(self) -> None:
        """Refuse a limit that nothing fits."""
        super().__post_init__()
        check_iterations("Direct", self.max_size, "max_size")

    def prepare(self, operator: Operator) -> tuple[Tensor, Tensor]:
        """Lay H out and invert it.

        Args:
            operator: H.

        Returns:
            H and H⁺, two p × p matrices.

        Raises:
            DefinitionError: H is too large to lay out.
        """
        p = _tree.size(operator.like)
        if p > self.max_size:
            raise DefinitionError(
                f"Direct() would lay out a {p:,} × {p:,} matrix; it takes at most {self.max_size:,}. Use CG, or raise "
                "max_size."
            )
        matrix = operator.dense()
        if not p:
            return matrix, matrix
        # What is not finite is not decomposed: it makes the answer NaN.
        good = torch.isfinite(matrix).all()
        safe, factor = torch.where(good, matrix, 0), torch.where(good, 1.0, torch.nan)
        if not operator.symmetric:
            return matrix, factor * torch.linalg.pinv(safe)
        eigenvalues, q = torch.linalg.eigh((safe + safe.T) / 2)
        # A column is no better than its coarsest leaf.
        kept = eigenvalues.abs() > p * _tree.coarsest_epsilon(operator.like) * eigenvalues.abs().max()
        inverses = factor * torch.where(kept, 1 / torch.where(kept, eigenvalues, 1), 0)
        return matrix, q @ (inverses[:, None] * q.T)

    def compute(self, operator: Operator, prepared: tuple[Tensor, Tensor], rhs: Tree, start: None) -> Solution:
        """Solve Hw = v.

        Args:
            operator: H, not applied again.
            prepared: H and H⁺.
            rhs: v.
            start: not used.

        Returns:
            w with its statistics; `converged` means a relative residual below p · √ε.
        """
        del operator, start
        (matrix, inverse), v = prepared, ravel(rhs)
        w, v_norm = inverse @ v, _tree.norm(v)
        residual = _tree.norm(v - matrix @ w) / torch.where(v_norm > 0, v_norm, 1)
        return Solution(
            value=unravel(w, rhs),
            iterations=len(v),
            residual=residual,
            converged=residual <= max(len(v), 1) * _tree.coarsest_epsilon(rhs) ** 0.5,
            negative_curvature=torch.zeros_like(residual, dtype=torch.bool),
        )
