"""Vector operations on lists of tensors: scalars in few passes, and memory used again, where nothing forbids it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from funcmlo._hiding import hidden

_PLAIN = (Tensor, torch.nn.Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_FEW = 2**14  # entries for which a pass in float64 costs no more than a dispatch
_BLOCK = 2**16  # entries whose squares float32 sums to full precision


def plain(xs: Sequence[Tensor]) -> bool:
    """Say whether tensors are ordinary ones on the CPU and nothing traces them, so that looking at values is free."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and not hidden()
        and forward_ad._current_level < 0
        and torch._C._get_dispatch_mode(_PROXY) is None
        and not torch.compiler.is_compiling()
        and all(type(x) in _PLAIN and x.is_cpu and not torch._C._functorch.is_legacy_batchedtensor(x) for x in xs)
    )


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return ⟨x, y⟩.

    Args:
        xs: the leaves of one vector.
        ys: those of the other.
        dtype: what it is accumulated in.

    Returns:
        A 0-d tensor on the last leaf's device.
    """
    total: Tensor | None = None
    for x, y in zip(xs, ys, strict=True):
        part = _dot(x, y, dtype) if x.ndim == y.ndim == 1 else _dot(x.reshape(-1), y.reshape(-1), dtype)
        total = part if total is None else total.to(part.device) + part
    return torch.zeros((), dtype=dtype) if total is None else total


def _dot(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    if x.numel() > _BLOCK and plain((x, y)):  # blocks lose fewer digits, and no copy in another dtype is large
        parts = [
            torch.dot(p.to(dtype), q.to(dtype)) for p, q in zip(torch.split(x, _BLOCK), torch.split(y, _BLOCK), strict=True)
        ]
        return torch.stack(parts).sum(dtype=torch.float64).to(dtype)
    if x.dtype is dtype and y.dtype is dtype:
        return torch.dot(x, y)
    return torch.dot(x.to(dtype), y.to(dtype)).to(x.device)


def norm(xs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return ‖x‖; no float32 entry under- or overflows.

    Squares are summed in float64, which on a CPU takes 30 times as long as in float32. There, large float32 vectors are
    summed in blocks of their own dtype, and again in float64 where the result is not of ordinary size.

    Args:
        xs: the leaves.
        dtype: the result's.

    Returns:
        A 0-d tensor on the last leaf's device.
    """
    if len(xs) == 1 and xs[0].numel() <= _FEW:
        return _wide(xs[0], dtype)
    if not xs or not plain(xs):
        total = torch.zeros((), dtype=dtype)
        for i, x in enumerate(xs):
            part = _wide(x, dtype)
            total = torch.hypot(total.to(x.device), part) if i else part
        return total
    if all(x.dtype is torch.float32 and x.is_contiguous() for x in xs) and sum(x.numel() for x in xs) > _FEW:
        found = _together(torch._foreach_norm([block for x in xs for block in torch.split(x.view(-1), _BLOCK)]))
        if 1e-10 < found.item() < math.inf:
            return found.to(dtype)
    return _together(torch._foreach_norm(list(xs), 2, torch.float64)).to(dtype)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    wide = dtype if x.is_mps else torch.float64  # that device has no float64
    length: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return length.to(dtype)


def _together(norms: Sequence[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dtype=torch.float64)
    return length


def finite(xs: Sequence[Tensor]) -> Tensor:
    """Say whether every entry of floating-point tensors is finite.

    Args:
        xs: the tensors.

    Returns:
        A 0-d flag on the last one's device.
    """
    if plain(xs):
        return torch.tensor(all(_finite(x.detach()) for x in xs))
    flag = torch.ones((), dtype=torch.bool)
    for x in xs:
        flag = flag.to(x.device) & torch.isfinite(x).all()
    return flag


def _finite(x: Tensor) -> bool:
    # A finite sum has finite terms, and takes one pass without a copy; one that is not may have overflowed.
    return math.isfinite(x.sum(dtype=max(x.dtype, torch.float32, key=lambda d: d.itemsize)).item()) or bool(
        torch.isfinite(x).all()
    )


def unshared(xs: list[Tensor]) -> bool:
    """Say whether large tensors may be written to: nothing but this list holds them, views and graphs included.

    Args:
        xs: the tensors.

    Returns:
        Whether it is so; of small ones, whose memory is not worth the question, no.
    """
    return all(x.numel() > _FEW for x in xs) and all(_holders(xs, i) == _ALONE for i in range(len(xs)))


def _holders(xs: list[Any], i: int) -> tuple[int, ...]:
    storage = xs[i].untyped_storage()
    uses = xs[i]._use_count(), torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(xs[i]), sys.getrefcount(storage), *uses


_ALONE = _holders([torch.zeros(1)], 0)
