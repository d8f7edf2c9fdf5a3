"""A lower level that is a game: the Hessian is indefinite, and nonsingular."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.operators import ravel
from funcmlo.testing.known import Bilevel, linear_solve, normals, until_converged


@dataclass(frozen=True, repr=False, eq=False)
class Saddle(Bilevel):
    """g(y, x) = ½ ‖u‖² + uᵀMw − ½ ‖w‖² − yᵀBx over y = {"u": u, "w": w}: u minimizes it and w maximizes it.

    The solution is where ∇_y g = 0: with the indefinite H = [[I, M], [Mᵀ, −I]], y* = H⁻¹Bx and Jᵀv = BᵀH⁻¹v. Its `optimizer`
    is gradient descent of u and ascent of w, which contracts: an estimator that takes g to be minimized at y* is wrong
    here, one that only needs ∇_y g = 0 and a symmetric nonsingular H is right. f(x, y) = Σ sin y + ½ ‖x‖².

    Args:
        seed: decides all numbers.
        size: of u and of w.
        coupling: ‖M‖, below 1.

    Example:
        >>> import torch
        >>> from funcmlo.testing.saddle import Saddle
        >>> torch.linalg.eigvalsh(Saddle(size=1, coupling=0.0).hessian)
        tensor([-1.,  1.], dtype=torch.float64)
    """

    seed: int = 0
    size: int = 2
    coupling: float = 0.5

    assumptions: ClassVar[frozenset[Assumption]] = frozenset({"minimization", "nonsingular"})

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        normal = normals(self.seed)
        m = normal(self.size, self.size)
        m = self.coupling * m / torch.linalg.matrix_norm(m, 2)
        eye = torch.eye(self.size, dtype=torch.float64)
        hessian = torch.cat([torch.cat([eye, m], 1), torch.cat([m.T, -eye], 1)])
        return hessian, normal(2 * self.size, 2), normal(2), normal(2 * self.size)

    @property
    def hessian(self) -> Tensor:
        """H, by which the entries of u come before those of w."""
        return self._drawn[0]

    def _tree(self, flat: Tensor) -> Tree:
        return {"u": flat[: self.size], "w": flat[self.size :]}

    @property
    def x(self) -> Tensor:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[2]

    @property
    def start(self) -> Tree:
        """Where an inner loop starts."""
        return self._tree(self._drawn[3])

    @property
    def rate(self) -> float:
        """The rate of both players."""
        return 0.8

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance: each leaves ρ = |1 − rate (1 ± i ‖M‖)| of it."""
        return until_converged(math.hypot(1 - self.rate, self.rate * self.coupling))

    @property
    def optimizer(self) -> GradientTransformation:
        """Gradient descent of u and ascent of w, at `rate`."""
        signs = {"u": -self.rate, "w": self.rate}

        def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
            del params, inplace
            return {name: signs[name] * x for name, x in updates.items()}, state

        return GradientTransformation(lambda params: (), update)

    def inner(self, y: Tree, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        flat = ravel(y)
        return 0.5 * flat @ (self.hessian.to(flat) @ flat) - flat @ (self._drawn[1].to(flat) @ x.to(flat))

    def outer(self, x: Tensor, y: Tree) -> Tensor:
        """Return f(x, y)."""
        return torch.sin(ravel(y)).sum() + 0.5 * (x**2).sum()

    def solution(self) -> Tree:
        """Return y*(x) to rounding."""
        return self._tree(linear_solve(self.hessian, self._drawn[1] @ self.x))

    def response(self, v: Tree) -> Tensor:
        """Return Jᵀv."""
        return self._drawn[1].T @ linear_solve(self.hessian, ravel(v))
