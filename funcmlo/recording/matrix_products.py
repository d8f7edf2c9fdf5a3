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


_LIBRARY: Any = torch.library.Library("funcmlo", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("matrix_product(Tensor a, Tensor b, Tensor? bias) -> Tensor")


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Ab + bias, by oneDNN."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return found


def _form(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return a.new_empty((a.shape[0], b.shape[1]))


_LIBRARY.impl("matrix_product", _product, "CPU")
_LIBRARY.impl("matrix_product", _form, "Meta")


def faster(one: Instruction, kinds: Sequence[Kind]) -> tuple[Ref, Ref, Ref | None] | None:
    """Return what `matrix_product` takes in place of an instruction, if it is faster.

    Args:
        one: an instruction.
        kinds: every number's kind.

    Returns:
        a, b and bias of ab + bias; or None.
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
    if not usual or m * k * n < LEAST or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if bias is not None and tuple(kinds[bias.number].shape) != (n,):
        return None
    return (a, b, bias) if _wins(left, right, torch.get_num_threads()) else None


@functools.cache
def _wins(left: Kind, right: Kind, threads: int) -> bool:
    del threads  # it decides the time
    a, b = (torch.empty_strided(x.shape, x.stride).fill_(0.5) for x in (left, right))
    return 1.1 * _seconds(lambda: _product(a, b, None)) < _seconds(lambda: a.mm(b))


def _seconds(call: Callable[[], Any]) -> float:
    call()
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best
