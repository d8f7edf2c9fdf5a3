"""The identity in place of the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.checks import check_positive
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Identity(LinearSolver):
    """w = scale · v: H⁻¹ taken to be a multiple of the identity, without a product.

    It is the first term of the Neumann series, and knows nothing about its residual.

    Args:
        scale: what stands in for H⁻¹.

    Raises:
        DefinitionError: the scale is out of its range.

    Example:
        >>> import torch
        >>> from funcmlo.operators import Operator
        >>> v = torch.tensor([1.0, 2.0])
        >>> solution = Identity(0.5).solve(Operator(lambda u: 2 * u, like=v), v)
        >>> solution.value, solution.products
        (tensor([0.5000, 1.0000]), 0)

    References:
        Luketina et al. 2016, arXiv 1511.06727 (T1–T2).
    """

    scale: float = 1.0

    uses_operator: ClassVar[bool] = False
    assumes: ClassVar[frozenset[Assumption]] = frozenset()
    inverts: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a scale out of range."""
        super().__post_init__()
        check_positive("Identity", scale=self.scale)

    def compute(self, operator: Operator, prepared: None, rhs: Tree, start: None) -> Solution:
        """Return scale · v.

        Args:
            operator: H, not applied.
            prepared: nothing.
            rhs: v.
            start: not used.

        Returns:
            w; the statistics are None.
        """
        del operator, prepared, start
        return Solution(_tree.scale(self.scale, rhs), 0, None, None, None)
