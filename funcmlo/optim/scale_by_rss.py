"""Adagrad's direction."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import plus, root
from funcmlo.optim.transformation import Mended


class RssState(NamedTuple):
    """The sum of squares so far."""

    sum_of_squares: Tree


def scale_by_rss(initial_accumulator_value: float = 0.0, eps: Hyperparameter = 1e-10) -> Mended:
    """Return u = g / (√s + ε), with s ← s + g².

    torchopt cuts the update from the graph where s = 0; here its derivative there is that of g / (|g| + ε), 1/ε.

    Args:
        initial_accumulator_value: where s begins.
        eps: ε.

    Returns:
        The transformation.

    References:
        Duchi, Hazan and Singer 2011, Journal of Machine Learning Research 12.
    """

    def init(params: Tree) -> RssState:
        return RssState(_tree.map(lambda p: torch.full_like(p, initial_accumulator_value), params))

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        sums = [torch.addcmul(s, g, g) for s, g in zip(_tree.leaves(state.sum_of_squares), gs, strict=True)]
        answer = [g / plus(root(s), e) for g, s, e in zip(gs, sums, spread(eps, updates, "eps"), strict=False)]
        return _tree.unflatten(structure, answer), RssState(_tree.unflatten(structure, sums))

    return Mended(init, update)
