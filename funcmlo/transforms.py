"""Parameters without bounds for quantities with bounds: what keeps a parameter in an open set is no projection."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError


def positive(raw: Tree) -> Tree:
    """Return softplus(raw) = log(1 + eʳᵃʷ) > 0, entry by entry, for use in a loss.

    The level's parameters are unbounded, so there is no constraint that could be active, and every estimator may be used.
    Unlike `torch.nn.functional.softplus`, which is linear beyond 20, it is right to rounding everywhere.

    Args:
        raw: a tree of floating-point tensors.

    Returns:
        A tree like raw.

    Example:
        >>> import torch
        >>> positive(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """
    return _tree.map(_softplus, raw)


def positive_inverse(value: Tree) -> Tree:
    """Return the raw parameters whose `positive` is a value, log(eᵛ − 1) = v + log(1 − e⁻ᵛ): where a level starts.

    Args:
        value: a tree of positive floating-point tensors.

    Returns:
        A tree like value.

    Raises:
        ParameterError: an entry is not positive (checked outside of torch.func transforms).

    Example:
        >>> import torch
        >>> positive(positive_inverse(torch.tensor([0.001, 1.0, 100.0])))
        tensor([1.0000e-03, 1.0000e+00, 1.0000e+02])
    """
    if not _tracing.unreadable() and not all(bool((v > 0).all()) for v in _tree.leaves(value)):
        raise ParameterError("positive_inverse: an entry is not positive, and positive(raw) always is; expected values > 0.")
    return _tree.map(_inverse, value)


def _softplus(r: Tensor) -> Tensor:
    # Each side sees its own half, so that no exponential overflows, not even where its value is not used.
    zero, right = torch.zeros_like(r), r > 0
    above, below = torch.where(right, r, zero), torch.where(right, zero, r)
    return torch.where(right, above + torch.log1p(torch.exp(-above)), torch.log1p(torch.exp(below)))


def _inverse(v: Tensor) -> Tensor:
    return v + torch.log(-torch.expm1(-v))
