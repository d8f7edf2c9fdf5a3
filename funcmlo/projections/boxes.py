"""Bounds on single entries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError
from funcmlo.projections.entries import by_leaf, check_fits, checked_leaves


def box(tree: Tree, lower: Any = None, upper: Any = None) -> Tree:
    """Project on the box {y : lower ≤ y ≤ upper}: P(y) = min(max(y, lower), upper), entry by entry.

    ∂P/∂y is 1 where lower ≤ y ≤ upper, and 0 elsewhere, where the entry moves with its bound. Where bounds are tensors and a
    lower one is above the upper, the upper one counts.

    Args:
        tree: y, a tree of floating-point tensors.
        lower: a number, a tensor that broadcasts to each leaf, or a tree like y of them; None for no bound.
        upper: the same.

    Returns:
        A tree like y.

    Raises:
        ParameterError: a bound does not fit the tree; or both are numbers, and the lower one is above the upper.

    Example:
        >>> import torch
        >>> box(torch.tensor([-1.0, 0.5, 2.0]), 0.0, 1.0)
        tensor([0.0000, 0.5000, 1.0000])
    """
    if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and not lower <= upper:
        raise ParameterError(f"box(lower={lower!r}, upper={upper!r}): nothing is between them; expected lower ≤ upper.")
    leaves, structure = checked_leaves("box", tree)
    lows, highs = by_leaf("box", "lower", lower, tree), by_leaf("box", "upper", upper, tree)
    for y, low, high in zip(leaves, lows, highs, strict=True):
        check_fits("box", "lower", low, y, y.shape)
        check_fits("box", "upper", high, y, y.shape)
    return _tree.unflatten(structure, map(clamp, leaves, lows, highs))


def nonnegative(tree: Tree) -> Tree:
    """Project on {y : y ≥ 0}: P(y) = max(y, 0), entry by entry.

    Args:
        tree: y, a tree of floating-point tensors.

    Returns:
        A tree like y.

    Raises:
        ParameterError: a leaf is no floating-point tensor.

    Example:
        >>> import torch
        >>> nonnegative(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 2.])
    """
    leaves, structure = checked_leaves("nonnegative", tree)
    return _tree.unflatten(structure, [clamp(y, 0.0) for y in leaves])


def clamp(y: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Return min(max(y, low), high); at a bound the derivative is the entry's, not the bound's.

    Args:
        y: a tensor.
        low: a number, a tensor, or None.
        high: the same.

    Returns:
        The entries between the bounds.
    """
    for side, bound in (("min", low), ("max", high)):
        if bound is None:
            continue
        if isinstance(bound, Tensor):
            # torch.clamp's two modes of differentiation disagree where an entry meets a tensor's.
            bound = bound.to(y.device, y.dtype)
            beyond = y < bound if side == "min" else y > bound
            y = torch.where(beyond | bound.isnan(), bound, y)
            continue
        if abs(bound) > torch.finfo(y.dtype).max:
            bound = math.copysign(math.inf, bound)  # torch refuses a number that half precision cannot hold
        y = torch.clamp(y, min=bound) if side == "min" else torch.clamp(y, max=bound)
    return y
