"""Operations that torch.func.vmap is slow at, by others that give the same numbers to rounding.

Batched products of matrices with one column each are five to twelve times slower on a CPU than those with one row each
(64 products of 500×20 with a vector: 315 µs and 40 to 60), and so are all that their derivatives consist of; Ab = (bᵀAᵀ)ᵀ.
Binary cross-entropy, for which maps have no rule, is taken apart by torch into exponentials and logarithms that cost five
times as much as its own formula, (1 − t) z − log σ(z).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Rewritten(TorchFunctionMode):
    """Run a block that a map surrounds with such operations rewritten."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call an operation, or what stands for it."""
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return b @ a.mT if (a.dim(), b.dim()) == (2, 1) else torch.matmul(a, b)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != 1:
        return F.linear(x, weight, bias)
    row = weight @ x.mT
    return (row if bias is None else row + bias).mT


def _binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    asked = any(x is not None for x in (weight, size_average, reduce, pos_weight))
    half = input.dtype not in (torch.float32, torch.float64)  # which autocast raises
    if asked or half or reduction not in _REDUCTIONS or input.shape != target.shape:
        return F.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction, pos_weight)
    return _REDUCTIONS[reduction]((1 - target) * input - F.logsigmoid(input))


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}
_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.matmul: _product,
    torch.mv: _product,
    torch.Tensor.matmul: _product,
    torch.Tensor.mv: _product,
    torch.Tensor.__matmul__: _product,
    F.linear: _linear,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}
