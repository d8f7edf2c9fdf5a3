"""Quadratic problems of any condition, on any trees: everything is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.operators import ravel, unravel
from funcmlo.testing.known import Bilevel, normals, until_converged


@dataclass(frozen=True, repr=False, eq=False)
class Quadratic(Bilevel):
    """g(y, x) = ½ yᵀAy − yᵀBx, so y* = A⁻¹Bx and Jᵀv = BᵀA⁻¹v; f(x, y) = Σ sin y + ½ ‖x‖².

    A is symmetric with eigenvalues from 1/condition to 1, B is normal; both follow from the seed.

    Args:
        seed: decides all numbers.
        condition: of A.
        y_like: a tree of float64 tensors of the shapes that y has.
        x_like: the same for x.

    Example:
        >>> import torch, funcmlo as fm
        >>> problem = fm.testing.Quadratic(seed=1, condition=10.0)
        >>> torch.allclose(problem.a @ problem.solution(), problem.b @ problem.x)
        True
    """

    seed: int = 0
    condition: float = 3.0
    y_like: Tree = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    x_like: Tree = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    assumptions: ClassVar[frozenset[Assumption]] = frozenset({"minimization", "positive definite", "nonsingular"})

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, Tree, Tree]:
        normal = normals(self.seed)
        n, m = _tree.size(self.y_like), _tree.size(self.x_like)
        q = torch.linalg.qr(normal(n, n))[0] if n else torch.zeros(0, 0, dtype=torch.float64)
        a = q @ torch.diag(torch.logspace(0, -1, n, base=self.condition, dtype=torch.float64)) @ q.T
        return (a + a.T) / 2, normal(n, m), unravel(normal(m), self.x_like), unravel(normal(n), self.y_like)

    @property
    def a(self) -> Tensor:
        """The Hessian."""
        return self._drawn[0]

    @property
    def b(self) -> Tensor:
        """The matrix of the cross term."""
        return self._drawn[1]

    @property
    def x(self) -> Tree:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[2]

    @property
    def start(self) -> Tree:
        """Where an inner loop starts."""
        return self._drawn[3]

    @property
    def steps(self) -> int:
        """Steps that leave (1 − 1/condition)^steps ≈ 1e-14 of the start's distance."""
        return until_converged(1 - 1 / self.condition)

    def inner(self, y: Tree, x: Tree) -> Tensor:
        """Return g(y, x)."""
        flat = ravel(y)
        return 0.5 * flat @ (self.a.to(flat) @ flat) - flat @ (self.b.to(flat) @ ravel(x).to(flat))

    def outer(self, x: Tree, y: Tree) -> Tensor:
        """Return f(x, y)."""
        return torch.sin(ravel(y)).sum() + 0.5 * (ravel(x) ** 2).sum()

    def solution(self) -> Tree:
        """Return y*(x) to rounding."""
        return unravel(torch.linalg.solve(self.a, self.b @ ravel(self.x).double()), self.y_like)

    def response(self, v: Tree) -> Tree:
        """Return Jᵀv, a tree like x."""
        return unravel(self.b.T @ torch.linalg.solve(self.a, ravel(v).double()), self.x_like)
