"""How many tasks are evaluated at once, chosen by measurement."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import ceil, inf

import torch

from funcmlo.errors import EstimatorError

WITHIN = 1.05
"""A smaller chunk, which needs less memory, is taken up to this factor of the least time."""

ROUNDS = 3


@dataclass(eq=False)
class Measured:
    """A level's choice of chunk sizes, made once for each of the sizes that it meets, and kept.

    Attributes:
        level: the level's name, for messages.
        latest: the last choice; None, which is all at once, before the first one.
    """

    level: str
    latest: int | None = None
    _chosen: dict[Hashable, int] = field(default_factory=dict)

    def choose(self, sizes: Hashable, n: int, attempt: Callable[[int], None], device: torch.device) -> int:
        """Return the chunk size to take.

        Args:
            sizes: what the choice is kept by.
            n: the number of tasks.
            attempt: evaluates all tasks once, by chunks of a size; with randomness="error" where sizes would draw
                differently.
            device: where.

        Returns:
            The smallest of those that were as fast as any, but for a few per cent.

        Raises:
            EstimatorError: what is drawn would follow from the choice.
        """
        if sizes not in self._chosen:
            self._chosen[sizes] = self._fastest(n, attempt, device)
        self.latest = self._chosen[sizes]
        return self.latest

    def _fastest(self, n: int, attempt: Callable[[int], None], device: torch.device) -> int:
        attempt(1)  # whatever fails here fails for itself
        best = dict.fromkeys(candidates(n), inf)
        for _ in range(ROUNDS):  # in turn, since what else the machine does comes and goes
            for size, seconds in list(best.items()):
                try:
                    best[size] = min(seconds, _seconds(lambda size=size: attempt(size), device))  # type: ignore[misc]
                except Exception as error:  # what no map can evaluate, or has no memory, simply loses
                    if size > 1 and "randomness error mode" in f"{error}{error.__cause__}":
                        raise EstimatorError(
                            f"level '{self.level}': its loss draws random numbers, other ones for each chunk size, so that "
                            "with chunk='measure' they would follow from a measurement; give randomness='same', or a number."
                        ) from error
                    del best[size]
        least = min(best.values())
        return min(size for size, seconds in best.items() if seconds <= WITHIN * least)


def candidates(n: int) -> list[int]:
    """Return the chunk sizes that are tried: one, all, and a few between.

    Args:
        n: the number of tasks.

    Returns:
        Sizes, the smallest first.

    Example:
        >>> candidates(32)
        [1, 2, 8, 32]
    """
    return sorted({1, ceil(n / 16), ceil(n / 4), n})


def _seconds(function: Callable[[], None], device: torch.device) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of maps that are slow, which is what is asked
        _finish(device)
        begin = _clock()
        function()
        _finish(device)
        return _clock() - begin


def _finish(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


_clock = time.perf_counter
