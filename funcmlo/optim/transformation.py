"""What an optimizer is here: torchopt's pair of functions, pure, and differentiable in every way that torch.func knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError


class Mended(GradientTransformation):  # type: ignore[misc]  # torchopt is not typed
    """A transformation that is pure and differentiable as it is, so that mending returns it unchanged."""


class Empty(NamedTuple):
    """The state of a part that remembers nothing."""


def stateless(change: Callable[[Tree, Tree], Tree]) -> Mended:
    """Return the transformation that remembers nothing.

    Args:
        change: (updates, parameters) → updates.

    Returns:
        The transformation.
    """

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        return change(updates, params), state

    return Mended(lambda params: Empty(), update)


def chain(*parts: GradientTransformation | None, name: str = "chain") -> Mended:
    """Return the parts one after the other; their states make a tuple.

    Args:
        *parts: transformations that are pure already; None stands for nothing.
        name: what the whole is called where a program is described.

    Returns:
        The whole.
    """
    made = [part for part in parts if part is not None]

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(part.init(params) for part in made)

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        if not isinstance(state, tuple) or len(state) != len(made):
            raise ParameterError(
                f"{name} was handed the state of another optimizer ({type(state).__name__} of "
                f"{len(state) if isinstance(state, tuple) else 0} parts, expected {len(made)}); begin with the state that "
                "its own init, or program.init, returns."
            )
        after = []
        for part, own in zip(made, state, strict=True):
            updates, new = part.update(updates, own, params=params, inplace=False)
            after.append(new)
        return updates, tuple(after)

    update.__qualname__ = f"{name}.<locals>.update"
    return Mended(init, update)


def apply(params: Tree, updates: Tree) -> Tree:
    """Return params + updates, each leaf in its own dtype."""
    return _tree.map(lambda p, u: p + u.to(p.dtype), params, updates)


def counter(params: Tree) -> Tensor:
    """Return a step counter at 0, on the first leaf's device: a tensor, so that vmap can map it."""
    first = next(iter(_tree.leaves(params)), None)
    return torch.zeros((), dtype=torch.int64, device=None if first is None else first.device)


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype in which what depends on a step's number alone is computed: float64 wherever there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def cast(x: Tensor, like: Tensor) -> Tensor:
    """Return x in another tensor's dtype."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
