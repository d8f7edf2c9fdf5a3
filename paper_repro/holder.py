"""A module that holds tensors, for libraries that know modules alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Holder(nn.Module):
    """Tensors as a module's parameters, for libraries that patch modules: calling it hands them to a function."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = list(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone()))

    def forward(self, call: Callable[[dict[str, Tensor]], Any]) -> Any:
        """Return `call(parameters)`."""
        return call({name: getattr(self, name) for name in self.names})
