"""What the Krylov solvers share: their settings, and their preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from funcmlo._tree import Tree
from funcmlo.linear.base import LinearSolver
from funcmlo.linear.checks import check_iterations, check_not_negative
from funcmlo.linear.preconditioner import Preconditioner, preconditioning, take_preconditioner
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Krylov(LinearSolver):
    """Base of the solvers that look for w in span{v, Hv, H²v, …}, one product an iteration.

    Args:
        iterations: the most iterations.
        tol: the relative residual to stop at.
        damping: λ ≥ 0.
        preconditioner: a map r ↦ M⁻¹r on trees, or what makes one from H; None for the identity.

    Raises:
        DefinitionError: a setting is out of its range.
    """

    iterations: int
    tol: float = 1e-10
    damping: float = 0.0
    preconditioner: Callable[[Tree], Tree] | Preconditioner | None = None

    goes_on: ClassVar[bool] = True
    knob: ClassVar[str | None] = "iterations"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        name = type(self).__name__
        check_iterations(name, self.iterations)
        check_not_negative(name, tol=self.tol, damping=self.damping)
        take_preconditioner(self)

    def prepare(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return the preconditioner as a map.

        Args:
            operator: H.

        Returns:
            r ↦ M⁻¹r.
        """
        return preconditioning(self.preconditioner, operator)
