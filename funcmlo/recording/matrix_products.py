"""Matrix products of compiled float32 graphs on a CPU by oneDNN, where that is faster than torch's own.

torch multiplies float32 matrices by MKL, which takes its slow path on processors that are not Intel's; oneDNN, which torch
carries too, takes twice the speed out of the same core there. Which one it is here is measured, once for each shape.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmlo.recording.tape import Instruction, Kind, Ref

_ATEN = torch.ops.aten
LEAST = 2**20
"""How many multiplications make it worth asking."""


def faster(one: Instruction, kinds: Sequence[Kind]) -> tuple[Any, Ref, Ref, Ref | None] | None:
    """Return what to compute a matrix product with, if not as it was recorded.

    Args:
        one: an instruction.
        kinds: every number's kind.

    Returns:
        An operation f with f(a, bᵀ, bias) = ab + bias, then a, b and bias; or None.
    """
    if one.operation is _ATEN.mm.default and not one.kwargs:
        bias, (a, b) = None, one.args[:2]
    elif one.operation is _ATEN.addmm.default and not one.kwargs:
        bias, a, b = one.args[:3]
    else:
        return None
    left, right = kinds[a.number], kinds[b.number]
    (m, k), n = left.shape, right.shape[1]
    usual = left.dtype == right.dtype == torch.float32 and left.device.type == right.device.type == "cpu"
    if not usual or m * k * n < LEAST or not torch.backends.mkldnn.is_available():
        return None
    if bias is not None and tuple(kinds[bias.number].shape) != (n,):
        return None
    return (_operation(), a, b, bias) if _wins(left, right, torch.get_num_threads()) else None


def _operation() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


@functools.cache
def _wins(left: Kind, right: Kind, threads: int) -> bool:
    del threads  # it decides the time
    a, b = (torch.empty_strided(x.shape, x.stride()).fill_(0.5) for x in (left, right))
    mine, product = _operation(), Tensor.mm
    return 1.1 * _seconds(lambda: mine(a, b.t(), None, "none", [], "")) < _seconds(lambda: product(a, b))


def _seconds(call: Callable[[], Any]) -> float:
    call()
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best
