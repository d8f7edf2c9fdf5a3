"""What a problem with a known hypergradient is: the interface of the test problems.

Notation: lower cost g(y, x), its solution y*(x), upper cost f(x, y), J = ∂y*/∂x, and dF/dx = ∇_x f + Jᵀ ∇_y f.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _tree
from funcmlo._argmin import argmin
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.hypergrad.base import BestResponse
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel, unravel
from funcmlo.state import State
from funcmlo.testing.written import Written


@dataclass(frozen=True, repr=False, eq=False)
class Known(Written, ABC):
    """A problem in float64 whose solution y*(x) and response Jᵀv are known without this library's estimators.

    A subclass is declared with `@dataclass(frozen=True, repr=False, eq=False)`: its repr is the code that makes it again.

    Attributes:
        assumptions: which of the assumptions that estimators make (`Claims.assumes`) it meets.
    """

    assumptions: ClassVar[frozenset[Assumption]] = frozenset()

    @property
    @abstractmethod
    def x(self) -> Tree:
        """The upper parameters at which everything is evaluated."""

    @property
    @abstractmethod
    def start(self) -> Tree:
        """Where an inner loop starts: a point that is not the solution."""

    @abstractmethod
    def outer(self, x: Tree, y: Tree) -> Tensor:
        """Return f(x, y)."""

    @abstractmethod
    def solution(self) -> Tree:
        """Return y*(x) to rounding."""

    @abstractmethod
    def response(self, v: Tree) -> Tree:
        """Return Jᵀv, a tree like x."""

    @abstractmethod
    def objective(self, response: BestResponse) -> Callable[[Tree], Tensor]:
        """Return x ↦ f(x, y*(x)) as ordinary torch code, its solution differentiated by an estimator."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        return type(self).__name__

    def hypergradient(self) -> Tree:
        """Return dF/dx = ∇_x f + Jᵀ ∇_y f at the solution, a tree like x."""
        x, y = self.x, self.solution()

        def outer(flat_x: Tensor, flat_y: Tensor) -> Tensor:  # torch.func takes no trees with None
            return self.outer(unravel(flat_x, x), unravel(flat_y, y))

        direct, v = torch.func.grad(outer, argnums=(0, 1))(ravel(x), ravel(y))
        return _tree.add(unravel(direct, x), self.response(unravel(v, y)))


@dataclass(frozen=True, repr=False, eq=False)
class Bilevel(Known):
    """A known problem whose solution minimizes a cost: y*(x) = argmin_y g(y, x)."""

    @property
    def rate(self) -> float:
        """The rate at which gradient descent from `start` converges."""
        return 1.0

    @property
    def steps(self) -> int:
        """So many steps of it reach the solution to about 1e-12."""
        return 100

    @property
    def optimizer(self) -> GradientTransformation:
        """Gradient descent at `rate`; a problem that it does not solve has another."""
        return torchopt.sgd(self.rate)

    @abstractmethod
    def inner(self, y: Tree, x: Tree) -> Tensor:
        """Return g(y, x)."""

    def objective(self, response: BestResponse) -> Callable[[Tree], Tensor]:
        """Return x ↦ f(x, y*(x)) as ordinary torch code, its solution differentiated by an estimator."""
        solve = argmin(self.inner, self.optimizer, steps=self.steps, response=response)
        return lambda x: self.outer(x, solve(self.start, x))

    def program(self, response: BestResponse, **fields: Any) -> Multilevel:
        """Return the problem as a program of levels "y" and "x".

        Args:
            response: the estimator of level "y".
            **fields: other fields of that level; by default `optimizer` and `steps`, which converge.

        Returns:
            The program.
        """
        fields = {"optimizer": self.optimizer, "steps": self.steps, **fields}
        lower = Level("y", self.inner, fields.pop("optimizer"), response=response, **fields)
        return Multilevel(lower, Level("x", self.outer, torchopt.sgd(0.1)))

    def state(self, program: Multilevel, *, solved: bool = True) -> State:
        """Return the state of `program` at x.

        Args:
            program: what `program` returned.
            solved: whether y is the solution, or the start.

        Returns:
            The state.
        """
        return program.init({"y": self.solution() if solved else self.start, "x": self.x})


def normals(seed: int) -> Callable[..., Tensor]:
    """Return `normal(*shape)`, which draws standard normal numbers in float64, the same whenever it is begun again."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def linear_solve(a: Tensor, b: Tensor) -> Tensor:
    """Return A⁻¹b of a dense matrix."""
    answer: Tensor = torch.linalg.solve(a, b)
    return answer


def until_converged(factor: float) -> int:
    """Return the steps that leave 1e-14 of a distance, where each leaves a factor of it: 1 − rate λ_min, as a rule."""
    return max(2, math.ceil(-32.3 / math.log(factor))) if factor > 0 else 2
