"""Preconditioners of the iterative solvers: maps, or what makes one from an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.operators import Operator


class Preconditioner(ABC):
    """What makes a preconditioner from an operator: a solver whose answer is a fixed linear map."""

    vmap: ClassVar[bool] = True
    """Whether it works on problems mapped by `torch.func.vmap`."""
    data_parallel: ClassVar[bool] = True
    """Whether it sees a level's examples by the operator alone, so that processes can share them."""
    differentiable: ClassVar[bool] = True
    """Whether it works where the solve is differentiated again."""

    @abstractmethod
    def inverse(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return r ↦ M⁻¹r, symmetric and positive definite, for M ≈ H.

        Args:
            operator: H, which is not applied again afterwards.

        Returns:
            The map.
        """


def preconditioning(given: Callable[[Tree], Tree] | Preconditioner | None, operator: Operator) -> Callable[[Tree], Tree]:
    """Return a solver's preconditioner as a map.

    Args:
        given: a map, what makes one from H, or None.
        operator: H.

    Returns:
        r ↦ M⁻¹r.
    """
    if isinstance(given, Preconditioner):
        return given.inverse(operator)
    return (lambda r: r) if given is None else given


def take_preconditioner(solver: Any) -> None:
    """Check a solver's `preconditioner`, and let the solver promise no more than it.

    Args:
        solver: a frozen solver that is being made.

    Raises:
        DefinitionError: it is not.
    """
    given = solver.preconditioner
    if isinstance(given, type) or not (given is None or callable(given) or isinstance(given, Preconditioner)):
        raise DefinitionError(
            f"{type(solver).__name__}(preconditioner={given!r}): expected a function from a tree to a tree, Nystrom(10), "
            "or None."
        )
    if isinstance(given, Preconditioner):
        for name in ("vmap", "differentiable"):
            object.__setattr__(solver, name, getattr(given, name))
