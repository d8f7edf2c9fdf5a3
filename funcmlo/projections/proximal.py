"""The proximal step of the 1-norm."""

from __future__ import annotations

from typing import Any

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError
from funcmlo.projections.boxes import clamp
from funcmlo.projections.entries import by_leaf, check_fits, checked_leaves


def soft_threshold(tree: Tree, strength: Any) -> Tree:
    """Make the proximal step of strength · ‖y‖₁: sign(y) max(|y| − strength, 0), entry by entry.

    After gradient steps of rate η it minimizes g(y) + λ‖y‖₁ where the strength is ηλ.

    Args:
        tree: y, a tree of floating-point tensors.
        strength: a number, not negative, a tensor that broadcasts to each leaf, or a tree like y of them.

    Returns:
        A tree like y.

    Raises:
        ParameterError: the strength is negative, or does not fit the tree.

    Example:
        >>> import torch
        >>> soft_threshold(torch.tensor([3.0, -2.0, 0.5]), 1.0)
        tensor([ 2., -1.,  0.])

    References:
        Beck and Teboulle 2009 (ISTA), doi 10.1137/080716542.
    """
    if strength is None or (isinstance(strength, (int, float)) and not strength >= 0):
        raise ParameterError(f"soft_threshold(strength={strength!r}): expected a number of at least 0.")
    leaves, structure = checked_leaves("soft_threshold", tree)
    strengths = by_leaf("soft_threshold", "strength", strength, tree)
    for y, s in zip(leaves, strengths, strict=True):
        check_fits("soft_threshold", "strength", s, y, y.shape)
    # Moreau: the step is what the projection on ‖y‖_∞ ≤ s leaves.
    return _tree.unflatten(structure, [y - clamp(y, -s, s) for y, s in zip(leaves, strengths, strict=True)])
