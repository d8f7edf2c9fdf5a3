"""The normal equations, for a system that is not symmetric."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_not_negative
from funcmlo.operators import Operator


@dataclass(frozen=True)
class NormalEquations(LinearSolver):
    """HᵀH w = Hᵀv by a solver for symmetric systems: two products a step, and the square of H's condition number.

    For a singular H that is a least-squares solution. The inner solver's damping λ is that of HᵀH + λI; its `throw`
    has no effect, this solver's has. In float32 the entries of HᵀH must not underflow: H of the order of 10⁻¹⁵ or more.

    The residual is that of the system itself, ‖v − Hw‖ / ‖v‖, at one product more. It is `converged` when that is at
    most `tol` and the inner solver, whose own tolerance is about ‖Hᵀv − HᵀHw‖ / ‖Hᵀv‖, has converged.

    Args:
        solver: the inner solver, such as `CG(20)`.
        tol: the relative residual at which the stats say «converged».

    Raises:
        DefinitionError: a setting is not what it should be.

    Example:
        >>> import torch
        >>> from funcmlo.linear.cg import CG
        >>> h, v = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([3.0, 4.0])
        >>> operator = Operator(lambda u: h @ u, like=v, symmetric=False, transpose=lambda u: h.T @ u)
        >>> solution = NormalEquations(CG(2)).solve(operator, v)
        >>> solution.value, solution.products
        (tensor([1.0000, 2.0000]), 6)

    References:
        Hestenes and Stiefel 1952, section 10.
    """

    solver: LinearSolver
    tol: float = 1e-3

    needs_transpose: ClassVar[bool] = True
    assumes: ClassVar[frozenset[Assumption]] = frozenset({"nonsingular"})

    def __post_init__(self) -> None:
        """Refuse what is no linear solver."""
        super().__post_init__()
        if not isinstance(self.solver, LinearSolver):
            raise DefinitionError(f"NormalEquations(solver={self.solver!r}): expected a linear solver such as CG(20).")
        if not self.solver.uses_operator or getattr(self.solver, "preconditioner", None) is not None:
            raise DefinitionError(
                f"NormalEquations({type(self.solver).__name__}(…)): what stands for H, as a preconditioner or an identity, "
                "does not stand for HᵀH; expected a solver without a preconditioner, such as CG(20)."
            )
        for name in ("goes_on", "carries_solution", "exact", "knob", "differentiable", "vmap"):
            object.__setattr__(self, name, getattr(self.solver, name))
        check_not_negative("NormalEquations", tol=self.tol)

    def prepare(self, operator: Operator) -> Any:
        """Prepare the inner solver.

        Args:
            operator: H.

        Returns:
            What it prepared for HᵀH.
        """
        return self.solver.prepare(_normal(operator))

    def start(self, like: Tree) -> Any:
        """Return the inner solver's first start.

        Args:
            like: a tree of the space that H acts on.

        Returns:
            What it starts from.
        """
        return self.solver.start(like)

    def compute(self, operator: Operator, prepared: Any, rhs: Tree, start: Any) -> Solution:
        """Solve HᵀH w = Hᵀv.

        Args:
            operator: H.
            prepared: what the inner solver prepared.
            rhs: v.
            start: what the inner solver goes on from, if it does.

        Returns:
            w with its statistics.
        """
        given = start if self.solver.goes_on else None
        inner = self.solver.compute(_normal(operator), prepared, _transposed(operator, rhs), given)
        v_norm = _tree.norm(rhs)
        some = ~(v_norm <= torch.finfo(v_norm.dtype).tiny)
        rest = _tree.norm(_tree.subtract(rhs, operator(inner.value)))
        residual = torch.where(some, rest / torch.where(some, v_norm, 1), 0)
        met = residual <= self.tol
        return replace(inner, residual=residual, converged=met if inner.converged is None else met & inner.converged)


def _transposed(operator: Operator, u: Tree) -> Tree:
    """Hᵀu."""
    return operator(u) if operator.transpose is None else operator.transpose(u)


def _normal(operator: Operator) -> Operator:
    """HᵀH."""
    return Operator(lambda u: _transposed(operator, operator(u)), like=operator.like)
