"""The peak memory of a call: the bytes of tensors that are alive at once, beyond those before it.

On a CPU every storage that an operation makes is followed from its birth to its end, so the number repeats to the byte
and does not depend on the allocator. What an operation takes inside and gives back is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcmlo import _tree

T = TypeVar("T")


def peak_memory(function: Callable[[], T]) -> tuple[T, int]:
    """Call a function and measure the most bytes of tensors that it has alive at once, beyond those before the call.

    On a GPU that is in use, its own allocator's numbers are added.

    Args:
        function: what is called, once and without arguments.

    Returns:
        What it returns, and the bytes.

    Example:
        Two vectors of 1000 float32 numbers, where the first is let go of only when the second is there:

        >>> import torch
        >>> ones, peak = peak_memory(lambda: (torch.zeros(1000) + 1).sum())
        >>> peak
        8000
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    before = {}
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
        torch.cuda.reset_peak_memory_stats(gpu)
        before[gpu] = torch.cuda.memory_allocated(gpu)
    with _Births() as births:
        result = function()
    return result, births.peak + sum(torch.cuda.max_memory_allocated(gpu) - before[gpu] for gpu in gpus)


class _Births(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make: `alive` bytes now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What comes in unknown was there before, or was made where nobody looked: it counts nothing.
        self._follow((args, kwargs or {}), born=False)
        out = func(*args, **(kwargs or {}))
        self._follow(out, born=True)
        return out

    def _follow(self, tree: Any, *, born: bool) -> None:
        for x in _tree.leaves(tree):
            if not isinstance(x, Tensor) or x.device.type not in ("cpu", "meta"):
                continue
            try:
                storage = x.untyped_storage()
            except (RuntimeError, NotImplementedError):  # sparse tensors have none
                continue
            if id(storage) not in self._sizes:
                size = storage.nbytes() if born and x.device.type == "cpu" else 0
                self._sizes[id(storage)] = size
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._ended, id(storage)).atexit = False

    def _ended(self, storage: int) -> None:
        self.alive -= self._sizes.pop(storage)
