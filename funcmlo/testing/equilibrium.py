"""An equilibrium: the fixed point of a layer, which minimizes no cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo._fixed_point import fixed_point
from funcmlo.assumptions import Assumption
from funcmlo.hypergrad.base import BestResponse
from funcmlo.testing.known import Known, linear_solve, normals, until_converged


@dataclass(frozen=True, repr=False, eq=False)
class Equilibrium(Known):
    """y = Φ(y, x) = tanh(Wy + Ux + b), with ‖W‖ < 1, so that Φ contracts.

    With D = diag(1 − y*²), the condition y − Φ(y, x) = 0 has the Jacobian I − DW, which is not symmetric, and
    Jᵀv = UᵀD (I − DW)⁻ᵀ v. f(x, y) = Σ sin y + ½ ‖x‖².

    Args:
        seed: decides all numbers.
        size: of y.
        contraction: ‖W‖.

    Example:
        >>> import torch, funcmlo as fm
        >>> from funcmlo.testing.equilibrium import Equilibrium
        >>> problem = Equilibrium(seed=1)
        >>> gradient = torch.func.grad(problem.objective(fm.AID(fm.GMRES(10))))(problem.x)
        >>> torch.allclose(gradient, problem.hypergradient())
        True

    References:
        Bai, Kolter and Koltun 2019, arXiv 1909.01377.
    """

    seed: int = 0
    size: int = 4
    contraction: float = 0.5

    assumptions: ClassVar[frozenset[Assumption]] = frozenset({"nonsingular"})

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        normal = normals(self.seed)
        w = normal(self.size, self.size)
        w = self.contraction * w / torch.linalg.matrix_norm(w, 2)
        return w, normal(self.size, 2), normal(self.size), normal(2), normal(self.size)

    @property
    def x(self) -> Tensor:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[3]

    @property
    def start(self) -> Tensor:
        """Where the iteration starts."""
        return self._drawn[4]

    @property
    def steps(self) -> int:
        """Iterations that leave contraction^steps ≈ 1e-14 of the start's distance."""
        return until_converged(self.contraction)

    def map(self, y: Tensor, x: Tensor) -> Tensor:
        """Return Φ(y, x)."""
        w, u, b = (part.to(y) for part in self._drawn[:3])
        return torch.tanh(w @ y + u @ x + b)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        return torch.sin(y).sum() + 0.5 * (x**2).sum()

    @cached_property
    def _solved(self) -> Tensor:
        y = self.start
        for _ in range(2 * self.steps):  # to rounding
            y = self.map(y, self.x)
        return y

    def solution(self) -> Tensor:
        """Return y*(x) to rounding."""
        return self._solved

    def jacobian(self) -> Tensor:
        """Return I − DW, the Jacobian of the condition at the solution."""
        eye = torch.eye(self.size, dtype=torch.float64)
        return eye - (1 - self.solution() ** 2)[:, None] * self._drawn[0]

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv."""
        return self._drawn[1].T @ ((1 - self.solution() ** 2) * linear_solve(self.jacobian().T, v))

    def objective(self, response: BestResponse) -> Callable[[Tensor], Tensor]:
        """Return x ↦ f(x, y*(x)) as ordinary torch code, its solution differentiated by an estimator."""
        solve = fixed_point(self.map, steps=self.steps, response=response)
        return lambda x: self.outer(x, solve(self.start, x))
