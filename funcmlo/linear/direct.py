"""The dense oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.linear.base import LinearSolver, Solution
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

    def __post_init__(self) -> None:
        """Refuse a limit that nothing fits."""
        if not self.max_size >= 1:
            raise DefinitionError(f"Direct(max_size={self.max_size!r}): expected an integer of at least 1.")

    def solve(self, operator: Operator, rhs: Tree) -> Solution:
        """Solve Hw = v.

        Args:
            operator: H.
            rhs: v.

        Returns:
            w with its statistics; `converged` means a relative residual below p · √ε.

        Raises:
            DefinitionError: H is too large to lay out.
        """
        p = _tree.size(rhs)
        if p > self.max_size:
            raise DefinitionError(
                f"Direct() would lay out a {p:,} × {p:,} matrix; it takes at most {self.max_size:,}. Use CG, or raise "
                "max_size."
            )
        matrix, v = operator.dense(), ravel(rhs)
        epsilon = _tree.coarsest_epsilon(rhs)  # a column is no better than its coarsest leaf
        if not p:
            w = v
        elif operator.symmetric:
            eigenvalues, q = torch.linalg.eigh((matrix + matrix.T) / 2)
            kept = eigenvalues.abs() > p * epsilon * eigenvalues.abs().max()
            w = q @ (torch.where(kept, 1 / torch.where(kept, eigenvalues, 1), 0) * (q.T @ v))
        else:
            w = torch.linalg.pinv(matrix) @ v
        v_norm = _tree.norm(v)
        residual = _tree.norm(v - matrix @ w) / torch.where(v_norm > 0, v_norm, 1)
        return Solution(
            value=unravel(w, rhs),
            products=p,
            iterations=p,
            residual=residual,
            converged=residual <= max(p, 1) * epsilon**0.5,
            negative_curvature=torch.zeros_like(residual, dtype=torch.bool),
        )
