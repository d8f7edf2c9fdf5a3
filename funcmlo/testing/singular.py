"""A Hessian that is singular, where the hypergradient is nevertheless defined."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo.assumptions import Assumption
from funcmlo.testing.known import Bilevel, normals, until_converged


@dataclass(frozen=True, repr=False, eq=False)
class SingularHessian(Bilevel):
    """g(y, x) = ½ yᵀAy − yᵀPBx, where A = Q diag(λ) Qᵀ has rank r < n, Q is n × r, and P = QQᵀ projects on its range.

    The solutions are A⁺Bx plus anything in the null space of A, and f(x, y) = Σ sin Qᵀy + ½ ‖x‖² does not see that part: the
    hypergradient is defined. Gradient descent leaves it as it was, so `solution` is A⁺Bx + (I − P) start. Of the responses
    `response` is that of least norm, Jᵀv = BᵀA⁺v, which is the one of the solution that gradient descent reaches.

    Args:
        seed: decides all numbers.
        size: n.
        rank: r.
        condition: of A on its range, whose eigenvalues go from 1/condition to 1.

    Example:
        >>> import torch
        >>> from funcmlo.testing.singular import SingularHessian
        >>> problem = SingularHessian(size=5, rank=3)
        >>> int(torch.linalg.matrix_rank(problem.a))
        3
    """

    seed: int = 0
    size: int = 4
    rank: int = 2
    condition: float = 3.0

    assumptions: ClassVar[frozenset[Assumption]] = frozenset({"minimization"})

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        normal = normals(self.seed)
        q = torch.linalg.qr(normal(self.size, self.rank))[0]
        eigenvalues = torch.logspace(0, -1, self.rank, base=self.condition, dtype=torch.float64)
        return q, eigenvalues, normal(self.size, 2), normal(2), normal(self.size)

    @property
    def a(self) -> Tensor:
        """The Hessian."""
        q, eigenvalues = self._drawn[:2]
        return q @ torch.diag(eigenvalues) @ q.T

    @property
    def x(self) -> Tensor:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[3]

    @property
    def start(self) -> Tensor:
        """Where an inner loop starts; not in the range of A."""
        return self._drawn[4]

    @property
    def steps(self) -> int:
        """Steps that leave (1 − 1/condition)^steps ≈ 1e-14 of the start's distance."""
        return until_converged(1 - 1 / self.condition)

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        q, eigenvalues, b = (part.to(y) for part in self._drawn[:3])
        z = q.T @ y
        return 0.5 * (eigenvalues * z**2).sum() - z @ (q.T @ b @ x)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        return torch.sin(self._drawn[0].to(y).T @ y).sum() + 0.5 * (x**2).sum()

    def solution(self) -> Tensor:
        """Return the y*(x) that gradient descent reaches from the start, to rounding."""
        q, eigenvalues, b = self._drawn[:3]
        return q @ ((q.T @ b @ self.x) / eigenvalues) + self.start - q @ (q.T @ self.start)

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv of the J of least norm."""
        q, eigenvalues, b = self._drawn[:3]
        return b.T @ (q @ ((q.T @ v) / eigenvalues))
