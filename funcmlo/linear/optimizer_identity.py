"""The optimizer's own scaling in place of the inverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import EstimatorError
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_positive
from funcmlo.linear.preconditioner import Preconditioner
from funcmlo.operators import Operator


@dataclass(frozen=True)
class OptimizerIdentity(LinearSolver, Preconditioner):
    """w = −scale · (∂u/∂g)ᵀ v, where u(g) is the update that the level's optimizer makes of a gradient g; no product.

    The implicit function theorem at u(∇g(y, x)) = 0 has (∂u/∂y)⁻¹, which is taken as the identity, and ∂u/∂g, which
    stays. For plain gradient descent that is the learning rate times v, for Adam another multiple for every parameter.

    As a preconditioner it must be positive definite: plain SGD's is, Adam's wherever the last gradient does not
    dominate its moments.

    Args:
        scale: a factor.

    Raises:
        DefinitionError: the scale is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> v = torch.tensor([1.0, 2.0])
        >>> descent = Operator(lambda u: 2 * u, like=v, adapt=lambda u: 0.1 * u)
        >>> OptimizerIdentity().solve(descent, v).value
        tensor([0.1000, 0.2000])

    References:
        Choe et al. 2023 (SAMA), arXiv 2310.05674.
    """

    scale: float = 1.0

    uses_operator: ClassVar[bool] = False
    assumes: ClassVar[frozenset[Assumption]] = frozenset()
    inverts: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a scale out of range."""
        super().__post_init__()
        check_positive("OptimizerIdentity", scale=self.scale)

    def prepare(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return the map.

        Args:
            operator: H, with its `adapt`.

        Returns:
            v ↦ −scale · (∂u/∂g)ᵀ v.

        Raises:
            EstimatorError: there is no optimizer.
        """
        adapt = operator.adapt
        if adapt is None:
            raise EstimatorError(
                "OptimizerIdentity needs the update of a level's optimizer, and this operator has no adapt= (a fixed "
                "point's or a bare cost's has none): use Identity(scale), or give Operator(…, adapt=v ↦ −(∂u/∂g)ᵀv)."
            )
        return lambda v: _tree.scale(self.scale, adapt(v))

    def compute(self, operator: Operator, prepared: Callable[[Tree], Tree], rhs: Tree, start: None) -> Solution:
        """Return −scale · (∂u/∂g)ᵀ v.

        Args:
            operator: H, not applied.
            prepared: the map.
            rhs: v.
            start: not used.

        Returns:
            w; the statistics are None.
        """
        del operator, start
        return Solution(prepared(rhs), 0, None, None, None)

    def inverse(self, operator: Operator) -> Callable[[Tree], Tree]:
        """Return the map as a preconditioner.

        Args:
            operator: H, with its `adapt`.

        Returns:
            r ↦ −scale · (∂u/∂g)ᵀ r.
        """
        return self.prepare(operator)
