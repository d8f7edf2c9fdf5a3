"""Balls of the 1-, 2- and ∞-norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.errors import ParameterError
from funcmlo.projections.boxes import clamp
from funcmlo.projections.entries import Over, along
from funcmlo.projections.simplices import thresholded


def ball(tree: Tree, radius: Any = 1.0, order: float = 2, over: Over = "tree") -> Tree:
    """Project on the ball {y : ‖y‖_p ≤ radius}; inside of it P(y) = y.

    Outside, with p = 2, P(y) = r ŷ for ŷ = y/‖y‖, ∂P/∂y = (r/‖y‖)(I − ŷŷᵀ) and ∂P/∂r = ŷ; with p = 1, P(y) = sign(y)
    max(|y| − τ, 0), where |y| is projected on a simplex; with p = ∞, entries are clamped to ±r.

    Args:
        tree: y, a tree of floating-point tensors.
        radius: a number, not negative, or a 0-d tensor; unless over="tree", also a tensor that broadcasts to each leaf's
            norms (with their dimensions kept), or a tree like y of them.
        order: p: 1, 2 or `math.inf`.
        over: which entries one norm is taken over: `"tree"` for all of the tree, `"leaf"` for those of each leaf, or a
            dimension of each leaf, or several.

    Returns:
        A tree like y.

    Raises:
        ParameterError: p is another; the radius is negative, or does not fit; a leaf has no such dimension, or no entries
            along it.

    Example:
        >>> import torch
        >>> ball({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
        {'w': tensor([0.6000]), 'b': tensor([0.8000])}

    References:
        Duchi et al. 2008, doi 10.1145/1390156.1390191, for p = 1.
    """
    if isinstance(radius, (int, float)) and not radius >= 0:
        raise ParameterError(f"ball(radius={radius!r}): expected a number of at least 0.")
    if order not in _BALLS:
        raise ParameterError(f"ball(order={order!r}): expected 1, 2 or math.inf.")
    return along("ball", tree, "radius", radius, over, _BALLS[order])


def _ball_1(y: Tensor, radius: Any) -> Tensor:
    size = y.abs()
    inside = size.sum(-1, keepdim=True) <= radius
    return torch.where(inside, y, y.sign() * thresholded(size, radius))


def _ball_2(y: Tensor, radius: Any) -> Tensor:
    # ŷ = (y/m) / ‖y/m‖ for every constant m: no square over- or underflows, and no derivative does.
    m = y.detach().abs().amax(-1, keepdim=True)
    m = torch.where(m > 0, m, torch.ones_like(m))
    square = ((y / m) ** 2).sum(-1, keepdim=True)
    # √ has no derivative at zero, not even where its value is not used.
    size = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
    inside = (m * size <= radius) | (square == 0)
    return torch.where(inside, y, y / m * (radius / size))


_BALLS: dict[float, Callable[[Tensor, Any], Tensor]] = {
    1: _ball_1,
    2: _ball_2,
    math.inf: lambda y, radius: clamp(y, -radius, radius),
}
