"""Regression with learned regularizers or weights: the everyday bilevel problems, their responses written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from funcmlo.assumptions import Assumption
from funcmlo.testing.known import Bilevel, linear_solve, normals, until_converged

_STRICT: frozenset[Assumption] = frozenset({"minimization", "positive definite", "nonsingular"})


@dataclass(frozen=True, repr=False, eq=False)
class Ridge(Bilevel):
    """g(y, x) = ‖Ay − b‖² / 2n + ½ Σ_j exp(x_j) y_j², with one log-regularizer x_j per feature, or one for all.

    With H = AᵀA/n + diag(exp x): y* = H⁻¹Aᵀb/n and Jᵀv = −exp(x) ∘ y* ∘ H⁻¹v. The upper cost is the squared error on
    other data, f(x, y) = ‖A'y − b'‖² / 2n.

    Args:
        seed: decides all numbers.
        features: the size of y.
        examples: n.
        shared: whether x is one number for all features, a 0-d tensor.

    Example:
        >>> import torch, funcmlo as fm
        >>> from funcmlo.testing.regression import Ridge
        >>> problem = Ridge(seed=1)
        >>> gradient = torch.func.grad(problem.objective(fm.AID(fm.Direct())))(problem.x)
        >>> torch.allclose(gradient, problem.hypergradient())
        True

    References:
        Bengio 2000, Gradient-based optimization of hyperparameters, Neural Computation 12(8).
    """

    seed: int = 0
    features: int = 3
    examples: int = 12
    shared: bool = False

    assumptions: ClassVar[frozenset[Assumption]] = _STRICT

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        normal = normals(self.seed)
        sizes = (self.examples, self.features)
        return (
            *(normal(*sizes), normal(self.examples)),
            *(normal(*sizes), normal(self.examples)),
            normal(*(() if self.shared else (self.features,))) / 2 - 1,
            normal(self.features),
        )

    @property
    def x(self) -> Tensor:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[4]

    @property
    def start(self) -> Tensor:
        """Where an inner loop starts."""
        return self._drawn[5]

    @cached_property
    def hessian(self) -> Tensor:
        """H at x."""
        a = self._drawn[0]
        return a.T @ a / self.examples + torch.diag(torch.exp(self.x).expand(self.features))

    @property
    def rate(self) -> float:
        """1/λ_max."""
        return 1 / float(torch.linalg.eigvalsh(self.hessian)[-1])

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance."""
        return until_converged(1 - 1 / float(torch.linalg.cond(self.hessian, 2)))

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        a, b = (part.to(y) for part in self._drawn[:2])
        return ((a @ y - b) ** 2).mean() / 2 + 0.5 * (torch.exp(x) * y**2).sum()

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        a, b = (part.to(y) for part in self._drawn[2:4])
        return ((a @ y - b) ** 2).mean() / 2

    def solution(self) -> Tensor:
        """Return y*(x) to rounding."""
        a, b = self._drawn[:2]
        return linear_solve(self.hessian, a.T @ b / self.examples)

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv."""
        products = -torch.exp(self.x) * self.solution() * linear_solve(self.hessian, v)
        return products.sum() if self.shared else products


@dataclass(frozen=True, repr=False, eq=False)
class LogisticRegression(Bilevel):
    """g(y, x) = (1/n) Σ_i w_i log(1 + exp(−t_i a_iᵀy)) + ½ Σ_j exp(r_j) y_j², with labels t_i = ±1.

    Either the weights of the examples are learned, w = σ(x), or the log-regularizers, r = x. With p_i = σ(a_iᵀy) and
    d_i = w_i p_i (1 − p_i) / n the Hessian is H = Aᵀ diag(d) A + diag(exp r), and Jᵀv = −Cᵀ H⁻¹ v, where C = ∂²g/∂y∂x has
    the columns −t_i σ(−t_i a_iᵀy) w'_i a_i / n or is diag(exp(r) ∘ y). The solution is Newton's, to rounding. The upper
    cost is the loss on other data.

    Args:
        seed: decides all numbers.
        learned: what x is.
        features: the size of y.
        examples: n.

    Example:
        >>> import torch, funcmlo as fm
        >>> from funcmlo.testing.regression import LogisticRegression
        >>> problem = LogisticRegression(seed=1)
        >>> gradient = torch.func.grad(problem.objective(fm.AID(fm.Direct())))(problem.x)
        >>> torch.allclose(gradient, problem.hypergradient())
        True

    References:
        Ren et al. 2018 (weights of examples), arXiv 1803.09050; Foo et al. 2007, Efficient multiple hyperparameter
        learning for log-linear models, NeurIPS.
    """

    seed: int = 0
    learned: Literal["weights", "regularizers"] = "weights"
    features: int = 3
    examples: int = 8

    assumptions: ClassVar[frozenset[Assumption]] = _STRICT

    @cached_property
    def _drawn(self) -> tuple[Tensor, ...]:
        normal = normals(self.seed)

        def data() -> tuple[Tensor, Tensor]:
            # Every margin is written as (t_i a_i)ᵀy, so that labels need not be kept.
            a, noise = normal(self.examples, self.features), normal(self.examples)
            return a, torch.sign(a.sum(1) + noise)

        (a, t), (a_, t_) = data(), data()
        x = normal(self.examples) if self.learned == "weights" else normal(self.features) / 2 - 1
        return t[:, None] * a, t_[:, None] * a_, x, normal(self.features)

    @property
    def x(self) -> Tensor:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[2]

    @property
    def start(self) -> Tensor:
        """Where an inner loop starts."""
        return self._drawn[3]

    def _settings(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the regularizers exp r."""
        if self.learned == "weights":
            return torch.sigmoid(x), torch.full((self.features,), 0.2).to(x)
        return torch.ones(self.examples).to(x), torch.exp(x)

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        weights, decay = self._settings(x)
        losses = torch.nn.functional.softplus(-self._drawn[0].to(y) @ y)
        return (weights * losses).mean() + 0.5 * (decay * y**2).sum()

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        return torch.nn.functional.softplus(-self._drawn[1].to(y) @ y).mean()

    def hessian(self, y: Tensor) -> Tensor:
        """Return ∇²_yy g(y, x) at any y."""
        a, (weights, decay) = self._drawn[0], self._settings(self.x)
        p = torch.sigmoid(a @ y)
        return a.T @ torch.diag(weights * p * (1 - p) / self.examples) @ a + torch.diag(decay)

    @property
    def rate(self) -> float:
        """1/L, with the Lipschitz constant L = ‖A‖² / 4n + max exp r of ∇g."""
        a, (_, decay) = self._drawn[0], self._settings(self.x)
        return 1 / float(torch.linalg.matrix_norm(a, 2) ** 2 / (4 * self.examples) + decay.max())

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance."""
        return until_converged(1 - self.rate * float(torch.linalg.eigvalsh(self.hessian(self.solution()))[0]))

    @cached_property
    def _solved(self) -> Tensor:
        a, (weights, decay) = self._drawn[0], self._settings(self.x)
        y = torch.zeros(self.features, dtype=torch.float64)
        for _ in range(20):  # quadratic convergence; once at rounding it stays there
            gradient = decay * y - a.T @ (weights * torch.sigmoid(-a @ y)) / self.examples
            y = y - linear_solve(self.hessian(y), gradient)
        return y

    def solution(self) -> Tensor:
        """Return y*(x) to rounding."""
        return self._solved

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv."""
        y, a = self.solution(), self._drawn[0]
        w = linear_solve(self.hessian(y), v)
        if self.learned == "regularizers":
            return -torch.exp(self.x) * y * w
        slope = torch.sigmoid(self.x) * torch.sigmoid(-self.x)
        return slope * torch.sigmoid(-a @ y) * (a @ w) / self.examples
