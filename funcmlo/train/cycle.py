"""Iterables without end: begun again when they end."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader

from funcmlo.errors import BatchError
from funcmlo.train.generators import drawing, generators
from funcmlo.train.loaders import again, end, is_plain
from funcmlo.train.order import announce, batch_seed, epoch_seed

_END = object()


class Cycle:
    """n ↦ the batches of an iterable that follow the first n, epoch after epoch.

    Each batch, and the beginning of each epoch, is drawn under a seed of its own.

    Args:
        level: whose batches they are.
        given: the iterable; a torch loader is made again, for workers of its own.
        seed: where all randomness comes from.
        pin: whether pinned memory is of use.
    """

    def __init__(self, level: str, given: Iterable[Any], seed: int, *, pin: bool = False) -> None:
        self.level, self.given, self.seed, self.pin = level, given, seed, pin
        self.taken = 0  # of an iterator, which is not begun again

    def __call__(self, drawn: int) -> Generator[Any]:
        """Give the batches that follow the first ones.

        Args:
            drawn: how many to draw and drop.

        Yields:
            The batches.

        Raises:
            BatchError: there is none, or an iterator has ended.
        """
        given, ours = self.given, isinstance(self.given, DataLoader) and is_plain(self.given)
        if isinstance(given, DataLoader) and ours:
            streaming = ("batch_size", "drop_last", "persistent_workers")
            given = again(given, self.seed, self.pin, **{name: getattr(given, name) for name in streaming})
        once = isinstance(given, Iterator)
        held = generators(given, given.collate_fn) if isinstance(given, DataLoader) else ()
        number = self.taken if once else 0
        iterator: Iterator[Any] | None = None
        try:
            for epoch in count():
                with drawing(epoch_seed(self.seed, self.level, epoch), held):
                    announce(epoch, given, getattr(given, "dataset", None))
                    iterator = iter(given)
                first = number
                while True:
                    with drawing(batch_seed(self.seed, self.level, number), held):
                        batch = next(iterator, _END)
                    if batch is _END:
                        break
                    number += 1
                    self.taken = number
                    if number > drawn:
                        yield batch
                if number == first:
                    raise BatchError(_nothing(self.level, given, number, once))
        finally:
            if ours:
                end(iterator)


def _nothing(level: str, given: Any, number: int, once: bool) -> str:
    """Say that an epoch was empty."""
    what = f"data['{level}'] ({type(given).__name__})"
    if not number:
        return f"{what} gives no batch: expected at least one."
    ended = "is an iterator and has ended" if once else "gives nothing when it is begun again"
    return (
        f"{what} {ended}, after {number} batches: pass what can be begun again and again (a DataLoader, an object whose "
        "__iter__ returns a new iterator) or an endless iterator."
    )
