"""Tensors in a file: their numbers once, their layout in memory too, and nothing of a storage they only look into.

What is computed from a tensor can depend on its strides (sums and products take the numbers in another order), so a run
goes on with the same bits only if the layout comes back as well.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcmlo.errors import CheckpointError

Stored: TypeAlias = Any
"""A tensor that fills its storage, or `("strided", numbers, shape, strides)`."""


def stored(x: Tensor) -> Stored:
    """Return a tensor as a file keeps it.

    Args:
        x: any strided tensor with numbers.

    Returns:
        The tensor itself if it fills its storage; a copy of its numbers alone otherwise, with its shape and strides if a
        copy would lose them.
    """
    x = x.detach()
    if _gaps(x.shape, x.stride()) == 0:
        fills = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        return x if fills else x.clone()  # a copy of a dense tensor keeps its strides
    core = x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.stride())]
    if _gaps(core.shape, core.stride()) is None:  # windows that overlap, which nothing can be copied into
        return x.clone(memory_format=torch.contiguous_format)
    return ("strided", core.clone(memory_format=torch.contiguous_format), list(x.shape), list(x.stride()))


def restored(core: Tensor, shape: list[int], strides: list[int]) -> Tensor:
    """Return the tensor that `stored` took apart.

    Args:
        core: its numbers, those of an expanded axis once.
        shape: its shape.
        strides: its strides.

    Returns:
        The tensor, on the device of its numbers.

    Raises:
        CheckpointError: the three do not belong together.
    """
    numbers = [1 if s == 0 else n for n, s in zip(shape, strides, strict=False)]
    if len(shape) != len(strides) or list(core.shape) != numbers or _gaps(core.shape, strides) is None:
        raise CheckpointError(f"shape {shape} and strides {strides} do not fit numbers of shape {list(core.shape)}.")
    own = torch.empty_strided(core.shape, strides, dtype=core.dtype, device=core.device).copy_(core)
    return own.as_strided(shape, strides)


def _gaps(shape: Any, strides: Any) -> int | None:
    """How many places between the numbers hold none; None if two numbers share a place."""
    filled, reach = 1, 1
    if 0 in shape:
        return 0
    for stride, size in sorted((s, n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride < reach:
            return None
        filled, reach = filled * size, reach + (size - 1) * stride
    return reach - filled
