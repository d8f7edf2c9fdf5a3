"""What is rewritten in a map gives the same numbers in every order, by the operations that are fast there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcmlo._mapped import Rewritten

A, B = torch.randn(2, 7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = (A[..., 0] > 0).double()

CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda w, a, t: (a @ w - t) ** 3,
    "mv": lambda w, a, t: (a.mv(w) - t) ** 3 + torch.mv(a, w) ** 2,
    "matmul": lambda w, a, t: torch.matmul(a, w) ** 3 + a.matmul(w) ** 2,
    "linear": lambda w, a, t: F.linear(a, w[None])[:, 0] ** 3,
    "linear with a bias": lambda w, a, t: F.linear(a, w[None], w[:1]).squeeze(-1) ** 3,
    "entropy": lambda w, a, t: F.binary_cross_entropy_with_logits(a @ w, t),
    "entropies": lambda w, a, t: F.binary_cross_entropy_with_logits(30 * (a @ w), t, reduction="none"),
    "sum of entropies": lambda w, a, t: F.binary_cross_entropy_with_logits(a @ w, t, reduction="sum"),
    "weighed": lambda w, a, t: F.binary_cross_entropy_with_logits(a @ w, t, pos_weight=w[0] ** 2),
    "several columns": lambda w, a, t: F.linear(a @ torch.outer(w, w), torch.outer(w, w)[:2]) ** 2,
    "of vectors": lambda w, a, t: (w @ w) * (a[0] @ w) + (w @ a.mT) ** 2,
}
W = B[:, 0]


class Seen(TorchDispatchMode):
    """Notes what is called below a map, and with which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[Any] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note an operation and call it."""
        self.names.append(func.name())
        if func is torch.ops.aten.bmm.default and args[1].shape[2] == 1 and args[1].shape[1] > 1:
            self.columns.append([x.shape for x in args])
        return func(*args, **(kwargs or {}))


def slopes(case: Callable[..., Tensor], w: Tensor, *rest: Tensor) -> list[Tensor]:
    """Value, gradient and a product of second derivatives, all copies together."""
    w = w.clone().requires_grad_()
    value = torch.func.vmap(case)(w, *rest)
    (gradient,) = torch.autograd.grad(value.sum(), w, create_graph=True)
    (second,) = torch.autograd.grad((gradient * w.detach()).sum(), w)
    return [value.detach(), gradient.detach(), second]


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_the_same(name: str) -> None:
    expected = slopes(CASES[name], W, A, T)
    with Rewritten(), Seen() as seen:
        came = slopes(CASES[name], W, A, T)
    for a, b in zip(came, expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)  # a few roundings of numbers of about one
    if name not in ("several columns", "weighed", "of vectors"):
        assert seen.columns == []
    if "entrop" in name:
        assert "aten::log_sigmoid_forward" in seen.names


def test_without_it_maps_multiply_by_columns() -> None:
    with Seen() as seen:
        slopes(CASES["entropy"], W, A, T)
    assert seen.columns
    assert "aten::log_sigmoid_forward" not in seen.names
