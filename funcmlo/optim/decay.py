"""Weight decay, in the gradient or beside the direction, and the gradient's sign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.transform.add_decayed_weights import MaskedNode, MaskedState

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.optim.hyperparameters import Hyperparameter, is_nothing, spread
from funcmlo.optim.transformation import Mended, cast, stateless


def decay(weight_decay: Hyperparameter, maximize: bool = False) -> Mended | None:
    """Return u = ± g + λ p; None where that is g.

    Args:
        weight_decay: λ.
        maximize: whether the gradient is turned around, not the decay.

    Returns:
        The transformation.
    """
    none = is_nothing(weight_decay)
    if none and not maximize:
        return None

    def change(updates: Tree, params: Tree) -> Tree:
        if maximize:
            updates = _tree.negative(updates)
        if none:
            return updates
        if params is None:
            raise DefinitionError("weight decay needs the parameters; call update(updates, state, params=params).")
        leaves, structure = _tree.flatten(updates)
        factors = spread(weight_decay, params, "weight_decay")
        rows = zip(leaves, _tree.leaves(params), factors, strict=False)
        return _tree.unflatten(structure, [_decayed(g, p, factor) for g, p, factor in rows])

    return stateless(change)


def _decayed(g: Tensor, p: Tensor, factor: float | Tensor) -> Tensor:
    return cast(g + factor * p, g) if isinstance(factor, Tensor) else torch.add(g, p, alpha=factor)


def masked(inner: GradientTransformation, mask: Tree | Callable[[Tree], Tree]) -> Mended:
    """Return what an inner transformation makes of some leaves, and the others as they are.

    torchopt's optimizers hand the mask's function a list of leaves, and take a mask given as a dict for its keys, which are
    all true; here the mask is a tree over the parameters' tree, or a prefix of it, as torchopt's page says.

    Args:
        inner: the transformation, pure.
        mask: a tree of booleans, or a function of the parameters (or updates) that returns one.

    Returns:
        The transformation.
    """

    def kept(tree: Tree, like: Tree) -> list[bool]:
        given = mask(like) if callable(mask) else mask
        leaves, structure = _tree.flatten(given)
        try:
            parts = structure.flatten_up_to(tree)
        except ValueError:
            raise DefinitionError(
                f"a mask is {_tree.describe(given)}, no prefix of the parameters' tree {_tree.describe(tree)}; expected a "
                "boolean for each leaf or for whole branches."
            ) from None
        return [bool(leaf) for leaf, part in zip(leaves, parts, strict=True) for _ in _tree.leaves(part)]

    def hidden(tree: Tree, kept: list[bool]) -> Tree:
        leaves, structure = _tree.flatten(tree)
        return _tree.unflatten(structure, [x if k else MaskedNode() for x, k in zip(leaves, kept, strict=True)])

    def init(params: Tree) -> MaskedState:
        return MaskedState(inner.init(hidden(params, kept(params, params))))

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        chosen = kept(updates, updates)
        own = None if params is None else hidden(params, chosen)
        new, state = inner.update(hidden(updates, chosen), state.inner_state, params=own, inplace=False)
        changed = iter(_tree.leaves(new))
        leaves, structure = _tree.flatten(updates)
        whole = [next(changed) if k else x for x, k in zip(leaves, chosen, strict=True)]
        return _tree.unflatten(structure, whole), MaskedState(state)

    return Mended(init, update)
