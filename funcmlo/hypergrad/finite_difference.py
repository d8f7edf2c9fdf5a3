"""The finite-difference best response."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from funcmlo._tree import Tree
from funcmlo.curvature.cross import check_loss, mixed_difference
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats


@dataclass(frozen=True)
class FiniteDifference(BestResponse):
    """Jᵀv ≈ −[∇_x g(y* + εv, x) − ∇_x g(y* − εv, x)] / 2ε: two gradients, no second derivative.

    The inverse Hessian is taken to be the identity, so the answer is −∇²_xy g · v: a direction, not the size, of the
    implicit hypergradient, which is what an adaptive upper optimizer needs.

    Args:
        scale: None chooses ‖εv‖ = √ε_m (1 + ‖y*‖) for the machine epsilon ε_m of the coarsest dtype among the
            level and its inputs, which balances rounding against curvature and the kinks of piecewise-linear networks; a
            number c sets ε = c/‖v‖, as DARTS and Betty do with 0.01.

    Raises:
        DefinitionError: the scale is not positive.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=FiniteDifference()),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2, dtype=torch.float64), "x": torch.ones(2, dtype=torch.float64)})
        >>> [round(float(g), 6) for g in program.hypergradient(state, {}, of="x")]
        [2.0, 2.0]

    References:
        Liu, Simonyan and Yang 2019 (DARTS), arXiv 1806.09055, eq. 8; Choe et al. 2023 (Betty), arXiv 2207.02849.
    """

    scale: float | None = None

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="identity", exact=False, knob="scale", assumes=frozenset({"minimization"}))
    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a step that is not positive."""
        check_scale("FiniteDifference", self.scale)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return the central difference of ∇_x g along v, for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.
        """
        check_loss("FiniteDifference", solved)
        return mixed_difference(solved, cotangent, self.scale), state, Stats(gradients=2)


def check_scale(owner: str, scale: float | None) -> None:
    """Raise unless a difference's scale is a positive number or None.

    Args:
        owner: the estimator's name, for the message.
        scale: what the user gave.

    Raises:
        DefinitionError: it is not.
    """
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and 0 < scale < math.inf):
        raise DefinitionError(f"{owner}(scale={scale!r}): expected a positive number, or None to choose it.")
