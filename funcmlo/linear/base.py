"""The interface of the linear solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Solution:
    """A linear solver's answer: never without saying how good it is.

    Attributes:
        value: w ≈ H⁻¹v.
        products: how often the operator was applied.
        iterations: iterations that changed w.
        residual: ‖v − Hw‖ / ‖v‖ as the solver knows it (0 for v = 0).
        converged: whether the residual met the solver's tolerance.
        negative_curvature: whether a direction of zero or negative curvature stopped the solver.
    """

    value: Tree
    products: int
    iterations: int | Tensor
    residual: Tensor
    converged: Tensor
    negative_curvature: Tensor


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Base of the solvers of Hw = v."""

    symmetric_only: ClassVar[bool] = False
    """Whether H must be symmetric."""

    @abstractmethod
    def solve(self, operator: Operator, rhs: Tree) -> Solution:
        """Solve Hw = v.

        Args:
            operator: H.
            rhs: v, a tree of the space that H acts on.

        Returns:
            w with its statistics.
        """


def check_iterations(owner: str, iterations: int) -> None:
    """Raise unless a number of iterations is an integer of at least one.

    Args:
        owner: the solver's name, for the message.
        iterations: what the user gave.

    Raises:
        DefinitionError: it is not.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or iterations < 1:
        raise DefinitionError(f"{owner}(iterations={iterations!r}): expected an integer of at least 1.")
