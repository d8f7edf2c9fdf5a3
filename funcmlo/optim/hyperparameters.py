"""A hyperparameter as a number, a tensor, or a tree of them over the parameters' tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, ParameterError

Hyperparameter: TypeAlias = Any
"""A real number, a 0-d tensor, or a tree of them that is a prefix of the parameters' tree; at a leaf of the parameters a
tensor that broadcasts against it."""


def check(optimizer: str, name: str, value: Hyperparameter, below: float = float("inf")) -> None:
    """Refuse a hyperparameter that can have no meaning; tensors' values are not looked at, as transforms forbid it.

    Args:
        optimizer: whose it is, for the message.
        name: what it is called there.
        value: what came.
        below: numbers must be at least 0 and below this.

    Raises:
        DefinitionError: a number is out of range, or a leaf is neither a number nor a floating-point tensor.
    """
    for path, leaf in [("", value)] if value is None or _is_number(value) else _tree.named_leaves(value):
        where = f"{optimizer}: {name}{path}"
        if isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                raise DefinitionError(f"{where} is a tensor of {leaf.dtype}; expected floating point: give it by .float().")
        elif not _is_number(leaf):
            came = "None" if leaf is None else type(leaf).__name__
            raise DefinitionError(
                f"{where} is {came}; expected a number, a floating-point tensor, or a tree of them that is a "
                "prefix of the parameters' tree."
            )
        elif not 0 <= leaf < below:
            expected = "at least 0" if below == float("inf") else f"in [0, {below:g})"
            raise DefinitionError(f"{where}={leaf!r}; expected a number {expected}.")


def is_nothing(value: Hyperparameter) -> bool:
    """Say whether a hyperparameter is the number 0, so that what it scales can be left out."""
    return _is_number(value) and value == 0


def spread(value: Hyperparameter, tree: Tree, name: str) -> Iterable[float | Tensor]:
    """Return a hyperparameter for each leaf of a tree.

    Args:
        value: the hyperparameter.
        tree: the parameters, or updates like them.
        name: what it is called, for messages.

    Returns:
        Numbers, and tensors that broadcast against the leaves, on their devices.

    Raises:
        ParameterError: it is no prefix of the tree, or a tensor in it does not broadcast against its leaf.
    """
    if _is_number(value):
        return itertools.repeat(value)
    if isinstance(value, Tensor) and not value.dim():
        return [_placed(value, x) for x in _tree.leaves(tree)]
    given, structure = _tree.flatten(value)
    try:
        parts = structure.flatten_up_to(tree)
    except ValueError:
        _no_prefix(value, tree, name)
    pairs: Iterable[tuple[Any, Any]] = zip(given, parts, strict=True)
    return [
        _fitted(leaf, x, name, tree) if part is x else _single(leaf, x, name)
        for leaf, part in pairs
        for x in _tree.leaves(part)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _single(h: float | Tensor, x: Tensor, name: str) -> float | Tensor:
    """One number for a leaf among several."""
    if isinstance(h, Tensor) and h.dim():
        raise ParameterError(
            f"{name} has shape {tuple(h.shape)} where it stands for several leaves of the parameters; expected a 0-d tensor "
            f"there, or a tree with a tensor for each leaf.{_per_step(name)}"
        )
    return _placed(h, x)


def _fitted(h: float | Tensor, x: Tensor, name: str, tree: Tree) -> float | Tensor:
    """A tensor for one leaf."""
    if isinstance(h, Tensor) and h.dim() and not _broadcasts(h, x):
        path = next(path for path, leaf in _tree.named_leaves(tree) if leaf is x)
        raise ParameterError(
            f"{name} has shape {tuple(h.shape)} where the parameters{path} have shape {tuple(x.shape)}; expected a shape "
            f"that broadcasts against it.{_per_step(name)}"
        )
    return _placed(h, x)


def _broadcasts(h: Tensor, x: Tensor) -> bool:
    pairs = zip(reversed(h.shape), reversed(x.shape), strict=False)
    return h.dim() <= x.dim() and all(a in {1, b} for a, b in pairs)


def _placed(h: float | Tensor, x: Tensor) -> float | Tensor:
    """A hyperparameter on a leaf's device, in its own dtype: in bfloat16 β₂ = 0.999 is 1."""
    return h.to(x.device) if isinstance(h, Tensor) and h.device != x.device else h


def _per_step(name: str) -> str:
    return " One rate for each step is written fm.optim.per_step(rates)." if name == "lr" else ""


def _no_prefix(value: Tree, tree: Tree, name: str) -> NoReturn:
    """Name the first leaf of the one or the other that has no counterpart."""
    mine = [path for path, _ in _tree.named_leaves(value)]
    theirs = [path for path, _ in _tree.named_leaves(tree)]
    extra = [path for path in mine if not any(p.startswith(path) for p in theirs)]
    missing = [path for path in theirs if not any(path.startswith(p) for p in mine)]
    what = f"{name}{extra[0]} has no counterpart" if extra else f"nothing is given for the parameters{(missing or [''])[0]}"
    what = what if extra or missing else "the containers differ"
    raise ParameterError(
        f"{name} is no prefix of the parameters' tree: {what}. It is {_tree.describe(value)}, the parameters are "
        f"{_tree.describe(tree)}; expected a number or tensor for each leaf or for whole branches."
    )
