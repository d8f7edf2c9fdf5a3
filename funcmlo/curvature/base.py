"""What a curvature operator is: one side of the implicit system, and the cross product that goes with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator

Cross = Callable[[Tree], dict[str, Tree]]
"""w ↦ −(∂F/∂x)ᵀ w for every input."""

Body = Callable[[Operator, Tree, Cross], Tree]
"""What is done with the system (∂F/∂y)ᵀ w = v: it receives the operator, v and the cross product."""


@dataclass(frozen=True)
class Curvature(ABC):
    """Base of the curvature operators: which (∂F/∂y)ᵀ stands in the implicit system at F(y*, x) = 0.

    The operator is good inside `body` only, so that it works inside torch.func transforms too.
    """

    assumes: ClassVar[frozenset[Assumption]] = frozenset({"minimization"})
    """What it asks of a problem."""
    exact: ClassVar[bool] = True
    """Whether it is the derivative of the condition itself, to rounding."""
    symmetric: ClassVar[bool] = True
    """Whether it is symmetric for a level's minimization."""
    stochastic: ClassVar[bool] = False
    """Whether its products depend on random draws."""
    differentiable: ClassVar[bool] = False
    """Whether the implicit response can be differentiated again with it."""
    total: ClassVar[bool] = True
    """Whether it works where the cost has solutions of levels below inside, as in `composition="nested"`."""
    second_order: ClassVar[bool] = True
    """Whether it takes more of the cost than gradients."""
    sees_step: ClassVar[bool] = False
    """Whether it looks at the optimizer's step and not at the cost alone."""

    @abstractmethod
    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with the system at a solution.

        Args:
            solved: the level at its solution.
            cotangent: v, a tree like `solved.params`.
            body: what is done; the tree that it returns is returned.
            transpose: whether an operator that is not symmetric must know its transpose.

        Returns:
            What the body returns.

        Raises:
            EstimatorError: the problem has no such operator.
        """
