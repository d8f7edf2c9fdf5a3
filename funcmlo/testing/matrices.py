"""The small problems that single checks are made of: matrices given, everything in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.operators import ravel, unravel


def flat(n: int) -> Tensor:
    """Return a space of n numbers."""
    return torch.zeros(n, dtype=torch.float64)


@dataclass(frozen=True)
class Matrices:
    """g(y, x) = ½ yᵀAy − φ(y)ᵀBx, with φ(y) = y unless told otherwise.

    Attributes:
        a: A, symmetric, its largest eigenvalue 1 unless a check is about that.
        b: B.
        y_like: the space of y.
        x_like: the space of x.
        bend: φ.
    """

    a: Tensor
    b: Tensor
    y_like: Tree = None
    x_like: Tree = None
    bend: Callable[[Tensor], Tensor] = field(default=lambda y: y)

    @property
    def params_space(self) -> Tree:
        """The space of y."""
        return flat(len(self.a)) if self.y_like is None else self.y_like

    @property
    def input_space(self) -> Tree:
        """The space of x."""
        return flat(self.b.shape[1]) if self.x_like is None else self.x_like

    def loss(self, y: Tree, inputs: dict[str, Tree], batch: Any = None) -> Tensor:
        """Return g(y, x)."""
        del batch
        at = ravel(y)
        a, b = self.a.to(at), self.b.to(at)
        return 0.5 * at @ (a @ at) - self.bend(at) @ (b @ ravel(inputs["x"]).to(at))

    def x(self, seed: int = 0) -> Tree:
        """Return a point above."""
        return normal(self.input_space, 1000 + seed)

    def solution(self, x: Tree) -> Tree:
        """Return A⁻¹Bx, where φ is the identity."""
        return unravel(torch.linalg.solve(self.a, self.b @ ravel(x).to(self.b)), self.params_space)


@dataclass(frozen=True)
class Batched(Matrices):
    """g_t(y, x) = ½ yᵀA_t y − yᵀB_t x: the matrices come as the batch, {"a": …, "b": …}."""

    def loss(self, y: Tree, inputs: dict[str, Tree], batch: Any = None) -> Tensor:
        """Return g_t(y, x)."""
        return Matrices(batch["a"], batch["b"]).loss(y, inputs)


def normal(space: Tree, seed: int) -> Tree:
    """Return a normal vector of a space."""
    generator = torch.Generator().manual_seed(seed)
    return _tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype), space)


def symmetric(n: int, condition: float, seed: int) -> Tensor:
    """Return a symmetric matrix with eigenvalues from 1/condition to 1."""
    q: Tensor = torch.linalg.qr(normal(torch.zeros(n, n, dtype=torch.float64), seed))[0]
    a: Tensor = q @ torch.diag(torch.logspace(0, -1, n, base=condition, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2


def cross(n: int, m: int, seed: int) -> Tensor:
    """Return a normal n × m matrix, far from symmetric where it is square."""
    found: Tensor = normal(torch.zeros(n, m, dtype=torch.float64), seed)
    return found
