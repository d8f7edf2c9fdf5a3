"""The simplex, by sorting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.errors import ParameterError
from funcmlo.projections.entries import Over, along


def simplex(tree: Tree, total: Any = 1.0, over: Over = -1) -> Tree:
    """Project on the simplex {y : y ≥ 0, Σ y = total}.

    P(y) = max(y − τ, 0) with the τ that makes the sum right. With the support S = {i : y_i > τ} of k entries,
    ∂P_S/∂y_S = I − 11ᵀ/k and ∂P_S/∂total = 1/k; all else is zero.

    Args:
        tree: y, a tree of floating-point tensors.
        total: the sum, a positive number or a 0-d tensor; unless over="tree", also a tensor that broadcasts to each
            leaf's sums (with their dimensions kept), or a tree like y of them.
        over: which entries make up one point: a dimension of each leaf, or several; `"leaf"` for all entries of each leaf,
            `"tree"` for all of the tree.

    Returns:
        A tree like y.

    Raises:
        ParameterError: the total is no positive number, or does not fit; a leaf has no such dimension, or no entries along
            it.

    Example:
        >>> import torch
        >>> simplex(torch.tensor([[0.5, 0.7, -3.0], [2.0, 0.0, 0.0]]))
        tensor([[0.4000, 0.6000, 0.0000],
                [1.0000, 0.0000, 0.0000]])

    References:
        Held, Wolfe and Crowder 1974, doi 10.1007/BF01580223; Duchi et al. 2008, doi 10.1145/1390156.1390191.
    """
    if isinstance(total, (int, float)) and not 0 < total < math.inf:
        raise ParameterError(f"simplex(total={total!r}): expected a positive number.")
    return along("simplex", tree, "total", total, over, thresholded)


def thresholded(y: Tensor, total: Any) -> Tensor:
    """Return max(y − τ, 0) of sum `total`, along the last dimension.

    The support is found by sorting, and is constant almost everywhere. Given it τ is a mean, so that nothing of the sorting
    is differentiated, and its rounding is that of a mean.

    Args:
        y: a tensor.
        total: a number, or a tensor that broadcasts; where it is zero, so is the answer.

    Returns:
        A tensor like y.
    """
    y = y - y.detach().amax(-1, keepdim=True)  # P(y + c·1) = P(y), and small numbers keep their digits
    down = y.detach().sort(-1, descending=True).values
    place = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    beyond = down.cumsum(-1) - (total.detach() if isinstance(total, Tensor) else total)
    # The largest entry is in the support of every sum but zero.
    count = (place * down > beyond).sum(-1, keepdim=True).clamp(min=1)
    support = ~(y.detach() < down.gather(-1, count - 1))  # with all that is NaN, which must not be hidden
    zero = torch.zeros_like(y)
    tau = (torch.where(support, y, zero).sum(-1, keepdim=True) - total) / support.sum(-1, keepdim=True)
    return torch.where(support, (y - tau).clamp(min=0.0), zero)
