"""`Solver`: an outside solver in the optimizer's place (a closed form, scipy, scikit-learn)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torchopt.base import GradientTransformation

from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError


@dataclass(frozen=True, eq=False)
class Solver:
    """A function that returns a level's solution, to be used where a `Level` or `argmin` takes an optimizer.

    It reads what a loss reads: the first argument is the level's own parameters (where the solver may start), the
    others are level names or `batch`. It is called without gradient, once for each of the level's `steps`; derivatives
    come from the level's loss at the solution, so the response must be implicit (`AID`, `FiniteDifference`).

    Args:
        function: `function(params, …)` → a tree like params; it may leave torch on the way.

    Raises:
        DefinitionError: the function is none.

    Example:
        Ridge regression in closed form, and dy*/dx of y* = argmin ‖y − 1‖² + x‖y‖² = 1/(1 + x):

        >>> import torch, funcmlo as fm
        >>> ridge = lambda y, x: ((y - 1) ** 2).sum() + x * (y**2).sum()
        >>> closed = fm.Solver(lambda y, x: torch.ones_like(y) / (1 + x))
        >>> solve = fm.argmin(ridge, closed, steps=1, response=fm.AID(fm.CG(5)))
        >>> torch.func.grad(lambda x: solve(torch.zeros(1), x).sum())(torch.tensor(1.0))
        tensor(-0.2500)
    """

    function: Callable[..., Tree]

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        if not callable(self.function):
            raise DefinitionError(f"Solver(function={self.function!r}): expected a function that returns a solution.")


def _no_update(*args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise EstimatorError(
        "an outside solver has no optimizer's update; use an estimator that does not ask for one, such as AID."
    )


STATELESS = GradientTransformation(lambda params: (), _no_update)
"""What stands in for the optimizer of a level with an outside solver: no state, no update."""
