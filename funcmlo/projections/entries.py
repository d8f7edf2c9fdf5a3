"""Which entries of a tree one constraint is over, and the settings that go with each leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError

Over: TypeAlias = Literal["tree", "leaf"] | int | tuple[int, ...]
"""What one constraint is over: all entries of the tree, all of each leaf, or those along dimensions of each leaf."""


def checked_leaves(name: str, tree: Tree) -> tuple[list[Tensor], Any]:
    """Return the leaves of a tree that is to be projected, and its structure.

    Args:
        name: the projection's name, for the message.
        tree: what the user gave.

    Returns:
        Leaves and structure.

    Raises:
        ParameterError: a leaf is no floating-point tensor.
    """
    leaves, structure = _tree.flatten(tree)
    for y in leaves:
        if not (isinstance(y, Tensor) and y.is_floating_point()):
            came = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise ParameterError(f"{name} projects trees of floating-point tensors, but a leaf is {came}; expected tensors.")
    return leaves, structure


def by_leaf(name: str, what: str, value: Any, tree: Tree) -> list[Any]:
    """Return a setting's value for each leaf: the same for all of them, or a tree's.

    Args:
        name: the projection's name, for the message.
        what: the setting's.
        value: a number, a tensor, None, or a tree.
        tree: what is projected.

    Returns:
        As many values as there are leaves.

    Raises:
        ParameterError: the value is a tree of another structure.
    """
    if value is None or isinstance(value, (int, float, Tensor)):
        return [value] * len(_tree.leaves(tree))
    if _tree.structure(value) != _tree.structure(tree):
        raise ParameterError(
            f"{name}({what}=…): a tree {_tree.describe(value)} came; expected a number, a tensor, or a tree like the "
            f"parameters, {_tree.describe(tree)}."
        )
    return _tree.leaves(value)


def check_fits(name: str, what: str, value: Any, y: Tensor, shape: Sequence[int]) -> None:
    """Raise unless a setting's tensor broadcasts to a shape, without making it larger.

    Args:
        name: the projection's name, for the message.
        what: the setting's.
        value: a number or a tensor.
        y: the leaf that it is for.
        shape: the shape.

    Raises:
        ParameterError: it does not.
    """
    if not isinstance(value, Tensor):
        return
    pairs = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or not all(a in (1, b) for a, b in pairs):
        raise ParameterError(
            f"{name}({what}=…): a tensor of shape {tuple(value.shape)} came, for a leaf of shape {tuple(y.shape)}; expected "
            f"one that broadcasts to {tuple(shape)}."
        )


def along(name: str, tree: Tree, what: str, value: Any, over: Over, project: Callable[[Tensor, Any], Tensor]) -> Tree:
    """Apply `project(y, value)`, which works along the last dimension, to the entries that each constraint is over.

    Args:
        name: the projection's name, for messages.
        tree: y.
        what: the name of its setting.
        value: the setting, a number, a tensor, or a tree of them.
        over: which entries one constraint is over.
        project: what is applied, in float32 at least.

    Returns:
        A tree like y.

    Raises:
        ParameterError: a leaf has no such dimension, or no entries along it; or the setting does not fit.
    """
    leaves, structure = checked_leaves(name, tree)
    if over != "tree":
        values = by_leaf(name, what, value, tree)
        found = [_along_leaf(name, y, what, v, over, project) for y, v in zip(leaves, values, strict=True)]
        return _tree.unflatten(structure, found)
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.dim() == 0):
        raise ParameterError(f"{name}({what}=…, over='tree'): expected one number, or a 0-d tensor, for the whole tree.")
    if not leaves:
        return tree
    dtype, device = _tree.precision(tree), leaves[0].device
    together = torch.cat([y.reshape(-1).to(device, dtype) for y in leaves])
    parts = torch.split(_apply(name, together, what, value, project), [y.numel() for y in leaves])
    return _tree.unflatten(structure, [p.view_as(y).to(y.device, y.dtype) for p, y in zip(parts, leaves, strict=True)])


def _along_leaf(name: str, y: Tensor, what: str, value: Any, over: Over, project: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """The dimensions that one constraint is over become the last one, and go back."""
    dims = _dimensions(name, y, over)
    order = [*(d for d in range(y.dim()) if d not in dims), *dims]
    kept = [1 if d in dims else n for d, n in enumerate(y.shape)]
    rows = [y.shape[d] for d in order if d not in dims]
    if isinstance(value, Tensor):
        check_fits(name, what, value, y, kept)
        value = value.expand(kept).reshape(*rows, 1)
    wide = y.to(_tree.precision(y)).permute(order)
    found = _apply(name, wide.reshape(*rows, math.prod(y.shape[d] for d in dims)), what, value, project)
    return found.reshape(wide.shape).permute(sorted(range(y.dim()), key=order.__getitem__)).to(y.dtype)


def _dimensions(name: str, y: Tensor, over: Over) -> tuple[int, ...]:
    if over == "leaf":
        return tuple(range(y.dim()))
    dims = over if isinstance(over, tuple) else (over,)
    if all(isinstance(d, int) and not isinstance(d, bool) and -y.dim() <= d < y.dim() for d in dims):
        dims = tuple(int(d) % y.dim() for d in dims)
        if dims and len({*dims}) == len(dims):
            return dims
    raise ParameterError(
        f"{name}(over={over!r}): a leaf of shape {tuple(y.shape)} has no such dimensions; expected some of its dimensions, "
        "each once, or 'leaf' or 'tree'."
    )


def _apply(name: str, y: Tensor, what: str, value: Any, project: Callable[[Tensor, Any], Tensor]) -> Tensor:
    if not y.shape[-1]:
        raise ParameterError(f"{name}: there are no entries to project; expected at least one for each {what}.")
    return project(y, value.to(y.device, y.dtype) if isinstance(value, Tensor) else value)
