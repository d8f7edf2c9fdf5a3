"""Normalization layers whose second derivative is wrong when it is taken from outside of a map.

The map's rule for the backward pass of batch, instance and layer norm uses the statistics that the forward pass saved, and
takes them for constants: what differentiates a mapped gradient from outside loses the part that runs through them, and
nothing says so. Inside the map, and without one, the derivatives are right.

References:
    https://github.com/pytorch/functorch/issues/534, open since 2022; seen in torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

_NORMS = ("batch_norm", "layer_norm")


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes whether such a layer is evaluated."""

    found: bool = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found = self.found or any(norm in func.name() for norm in _NORMS)
        return func(*args, **(kwargs or {}))


def normalizes(function: Callable[[], Any]) -> bool:
    """Say whether a function evaluates a normalization layer of that kind.

    Args:
        function: it is called once.

    Returns:
        Whether it does.
    """
    with _Watch() as watch:  # type: ignore[no-untyped-call]
        function()
    return bool(watch.found)
