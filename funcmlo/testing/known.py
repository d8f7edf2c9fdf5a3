"""What a problem with a known hypergradient is: the interface of the test problems.

Notation: lower cost g(y, x), its solution y*(x), upper cost f(x, y), J = ∂y*/∂x, and dF/dx = ∇_x f + Jᵀ ∇_y f.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torchopt
from torch import Tensor

from funcmlo import _tree
from funcmlo._argmin import argmin
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.hypergrad.base import BestResponse
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.state import State


@dataclass(frozen=True)
class Known(ABC):
    """A problem in float64 whose solution y*(x) and response Jᵀv are known without this library's estimators.

    A subclass is a frozen dataclass, so that its repr is the code that makes it again.

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
        direct, v = torch.func.grad(self.outer, argnums=(0, 1))(self.x, self.solution())
        return _tree.add(direct, self.response(v))


@dataclass(frozen=True)
class Bilevel(Known):
    """A known problem whose solution minimizes a cost: y*(x) = argmin_y g(y, x)."""

    rate: ClassVar[float] = 1.0
    """The rate at which gradient descent from `start` converges."""
    steps: ClassVar[int] = 100
    """So many steps of it reach the solution to about 1e-12."""

    @abstractmethod
    def inner(self, y: Tree, x: Tree) -> Tensor:
        """Return g(y, x)."""

    def objective(self, response: BestResponse) -> Callable[[Tree], Tensor]:
        """Return x ↦ f(x, y*(x)) as ordinary torch code, its solution differentiated by an estimator."""
        solve = argmin(self.inner, torchopt.sgd(self.rate), steps=self.steps, response=response)
        return lambda x: self.outer(x, solve(self.start, x))

    def program(self, response: BestResponse, **fields: Any) -> Multilevel:
        """Return the problem as a program of levels "y" and "x".

        Args:
            response: the estimator of level "y".
            **fields: other fields of that level; by default gradient descent that converges.

        Returns:
            The program.
        """
        fields = {"optimizer": torchopt.sgd(self.rate), "steps": self.steps, **fields}
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
