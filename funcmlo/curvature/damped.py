"""A curvature operator with a multiple of the identity added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.curvature.base import Body, Cross, Curvature
from funcmlo.curvature.hessian import Hessian
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Damped(Curvature):
    """H + λI, for solvers that have no damping of their own: bias for a system that can be solved.

    The answer is that of g + ½λ‖y − y*‖²: a solution that is held to where it is.

    Args:
        damping: λ > 0.
        curvature: H.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> response = fm.AID(fm.Direct(), curvature=Damped(1.0))
        >>> solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), steps=1, response=response)
        >>> torch.func.grad(lambda x: solve(torch.zeros(2), x).sum())(torch.ones(2))
        tensor([0.5000, 0.5000])

    References:
        Martens 2010, Deep learning via Hessian-free optimization.
    """

    damping: float
    curvature: Curvature = Hessian()

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings out of range, and take over what the damped curvature says of itself."""
        if (
            isinstance(self.damping, bool)
            or not isinstance(self.damping, (int, float))
            or not 0 < self.damping < float("inf")
        ):
            raise DefinitionError(f"Damped(damping={self.damping!r}): expected a positive finite number.")
        if not isinstance(self.curvature, Curvature):
            raise DefinitionError(
                f"Damped(curvature={self.curvature!r}): expected a curvature, Hessian() or GaussNewton(outputs, loss)."
            )
        for name in ("assumes", "symmetric", "stochastic", "sees_step", "second_order", "total"):
            object.__setattr__(self, name, getattr(self.curvature, name))

    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with (H + λI)w = v; see the base class."""

        def damped(operator: Operator, rhs: Tree, cross: Cross) -> Tree:
            plain, back = operator.matvec, operator.transpose
            shifted = replace(
                operator,
                matvec=lambda u: _tree.add_scaled(plain(u), self.damping, u),
                transpose=None if back is None else lambda u: _tree.add_scaled(back(u), self.damping, u),
            )
            return body(shifted, rhs, cross)

        return self.curvature.within(solved, cotangent, damped, transpose=transpose)
