"""Precision: what of a level is computed in 16 bits, and how its derivatives are kept in range there.

A level's cost may run under `torch.autocast`; solvers, optimizers and sums over the graph never do. Reverse passes are
linear, so loss scaling is an identity: Jᵀv = Jᵀ(σv)/σ, multiplied before the pass and divided after it, in the parameters'
own precision. It holds for products of every order, where a gradient node that scales in secret would not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError

HALF = (torch.float16, torch.bfloat16)
"""The dtypes of autocast."""

_scale: ContextVar[float | None] = ContextVar("loss_scale", default=None)
_Level = TypeVar("_Level")


def check(name: str, autocast: Any, loss_scale: Any) -> None:
    """Raise unless a level's fields of precision have a meaning.

    Args:
        name: the level's name.
        autocast: its field.
        loss_scale: its field.

    Raises:
        DefinitionError: one has none.
    """
    if autocast is not None and autocast not in HALF:
        raise DefinitionError(f"level '{name}': autocast={autocast!r}; expected torch.bfloat16, torch.float16 or None.")
    number = isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool)
    if loss_scale is not None and not (number and 0 < loss_scale < math.inf):
        raise DefinitionError(
            f"level '{name}': loss_scale={loss_scale!r}; expected a positive number, best a power of two such as 2.0**12."
        )


@contextmanager
def evaluating(autocast: torch.dtype | None, params: Tree) -> Generator[None]:
    """Run a block under autocast on the devices of some parameters; with None, as it is.

    Casts are not cached: a cache goes by the leaf tensor, and evaluations of one level meet under different transforms.

    Args:
        autocast: float16 or bfloat16.
        params: the level's parameters.
    """
    if autocast is None:
        yield
        return
    with ExitStack() as stack:
        for kind in _device_types(params):
            stack.enter_context(torch.autocast(kind, dtype=autocast, cache_enabled=False))
        yield


@contextmanager
def apart() -> Generator[None]:
    """Run a block outside of the autocast that surrounds it: a solver's products are not a network's layers."""
    with ExitStack() as stack:
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def inherited(level: _Level, params: Tree) -> _Level:
    """Return a level that takes over the autocast that surrounds the call, where it has none of its own.

    Args:
        level: a `Level`.
        params: its parameters, for their device.

    Returns:
        The level itself where nothing surrounds the call.
    """
    around = surrounding(params)
    if around is None or getattr(level, "autocast", None) is not None:
        return level
    return dataclasses.replace(level, autocast=around)  # type: ignore[type-var]


def surrounding(params: Tree) -> torch.dtype | None:
    """Return the dtype of the autocast that surrounds the call on some parameters' device; None where there is none."""
    kind = _device_types(params)[0]
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def raised(tree: Tree, params: Tree) -> Tree:
    """Return what was computed in 16 bits in the precision in which scalars about the parameters are computed.

    Args:
        tree: any tree; other tensors and other leaves stay as they are.
        params: the parameters.

    Returns:
        A tree like the first.
    """
    wide = _tree.precision(params)
    return _tree.map_tensors(lambda x: x.to(wide) if x.dtype in HALF else x, tree)


def epsilon(tree: Tree, autocast: torch.dtype | None) -> float:
    """Return the machine epsilon of a cost of these tensors: of the coarsest dtype, autocast's included.

    Args:
        tree: what goes into the cost.
        autocast: what it runs under; float64 tensors are left alone by it.

    Returns:
        The epsilon.
    """
    coarsest = _tree.coarsest_epsilon(tree)
    casts = autocast is not None and any(x.dtype != torch.float64 for x in _tree.leaves(tree))
    return max(coarsest, torch.finfo(autocast).eps) if casts and autocast is not None else coarsest


class scaled:  # ruff: ignore[invalid-class-name] - used as a function, on every step
    """Run a block whose reverse passes are scaled, or, with None, are not.

    Args:
        scale: S: a cost's gradient is taken as ∇(S · cost) / S.
    """

    __slots__ = ("_scale", "_token")

    def __init__(self, scale: float | None) -> None:
        self._scale = scale

    def __enter__(self) -> None:
        """Begin to scale."""
        self._token = None if self._scale is _scale.get() else _scale.set(self._scale)

    def __exit__(self, *raised: object) -> None:
        """Scale as before."""
        if self._token is not None:
            _scale.reset(self._token)


def scaling() -> bool:
    """Say whether reverse passes are being scaled."""
    return _scale.get() is not None


def in_range(
    linear: Callable[[list[Tensor]], list[Tensor | None]], operand: list[Tensor], *, forward: bool = False
) -> list[Tensor | None]:
    """Apply a linear map as L(σv)/σ, σ = S / max|v| rounded to a power of two times S; as it is where nothing is scaled.

    Cotangents come in any size: a conjugate gradient's residuals shrink, a learning rate multiplies. Within a pass they
    are then of the size of S, and where they reach a gradient that is divided by S itself, of the size of one.

    Args:
        linear: L, a reverse or forward pass.
        operand: v.
        forward: whether L goes forward, where tangents are to be of the size of one.

    Returns:
        L(v); None stays None.
    """
    scale = _scale.get()
    if scale is None or not operand:
        return linear(operand)
    largest = torch.zeros((), dtype=torch.float32)
    for x in operand:
        if x.numel():
            largest = torch.maximum(largest.to(x.device), x.detach().abs().amax().float())
    # The exponent is a step function, so that nobody's derivative sees σ; the bounds keep σv itself in float32's range.
    exponent = torch.floor(torch.log2(torch.where(largest > 0, largest, 1))).clamp(-90, 90)
    sigma = torch.exp2(-exponent) * (1.0 if forward else scale)
    products: list[Tensor | None] = _tree.scale(1 / sigma, linear(_tree.scale(sigma, operand)))
    return products


_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


def _device_types(params: Tree) -> list[str]:
    return list(dict.fromkeys(x.device.type for x in _tree.leaves(params))) or ["cpu"]
