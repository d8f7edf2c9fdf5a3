"""The order in which a loader's examples come: lists of indices, epoch after epoch, that follow from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any, NamedTuple

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from funcmlo._random import step_seed
from funcmlo.errors import BatchError
from funcmlo.sharing import part
from funcmlo.train.generators import drawing, generators

_AT_ONCE = 64
"""How many lists a sampler makes in one go; another number is another order where a sampler draws while it is read."""

_STEADY = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    list,
    tuple,
    range,
)
"""Samplers that give as many indices in every epoch as their length says, and keep nothing from epoch to epoch."""


class Draw(NamedTuple):
    """What makes a batch.

    Attributes:
        seed: what it draws follows from it.
        index: the indices of its examples; what the loader's sampler gave.
    """

    seed: int
    index: Any


def batch_seed(seed: int, level: str, number: int) -> int:
    """Return the seed of a batch, which no step of a level has."""
    return step_seed(seed, f"batches of {level}", number)


def epoch_seed(seed: int, level: str, epoch: int, part: int = 0) -> int:
    """Return the seed of an epoch's order, or of a part of it."""
    return step_seed(seed, f"order of {level}, epoch {epoch}", part)


def announce(epoch: int, *owners: Any) -> None:
    """Tell samplers, those that they read, and datasets the epoch's number."""
    for x in _read(*owners):
        if callable(getattr(x, "set_epoch", None)):
            x.set_epoch(epoch)


class Order:
    """The draws of a loader, epoch after epoch, without end.

    An exception of the sampler's ends it: it is kept as `failure`, so that the batches before it come first, however far
    ahead workers are.

    Args:
        loader: the loader, of a dataset with indices.
        level: whose batches they are.
        seed: where the order comes from.
        drawn: how many batches to pass over.
        rank: this process's number.
        size: how many processes share each batch.
    """

    def __init__(self, loader: DataLoader[Any], level: str, seed: int, drawn: int, rank: int, size: int) -> None:
        self.level, self.seed, self.drawn, self.rank, self.size = level, seed, drawn, rank, size
        self.single = loader.batch_sampler is None
        self.sampler: Any = loader.sampler if self.single else loader.batch_sampler
        self.whole = size == 1 or any(isinstance(x, DistributedSampler) for x in _read(self.sampler))
        self.held = generators(self.sampler, loader.generator)
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Draw]:
        """Give the draws that follow the first `drawn`."""
        # processes that share a batch draw different numbers for their parts
        name = self.level if self.size == 1 else f"{self.level}, part {self.rank} of {self.size}"
        try:
            for number, index in enumerate(self._indices(), self.drawn):
                yield Draw(batch_seed(self.seed, name, number), index if self.whole else self._part(index, number))
        except Exception as error:
            self.failure = error

    def _indices(self) -> Iterator[Any]:
        length = _length(self.sampler)
        first, passed = divmod(self.drawn, length) if length else (0, self.drawn)
        for epoch in count(first):
            empty = True
            for index in self._epoch(epoch):
                empty = False
                if passed:
                    passed -= 1
                else:
                    yield index
            if empty:
                raise BatchError(_nothing(self.level, self.sampler, epoch))

    def _epoch(self, epoch: int) -> Iterator[Any]:
        iterator: Iterator[Any] | None = None
        for turn in count():
            lists, failure = [], None
            with drawing(epoch_seed(self.seed, self.level, epoch, turn), self.held):
                try:
                    if iterator is None:
                        announce(epoch, self.sampler)
                        iterator = iter(self.sampler)
                    for index in islice(iterator, _AT_ONCE):
                        lists.append(index)
                except Exception as error:
                    failure = error
            yield from lists
            if failure is not None:
                raise failure
            if len(lists) < _AT_ONCE:
                return

    def _part(self, index: Any, number: int) -> Any:
        """This process's part of a list of indices."""
        several = isinstance(index, (list, tuple)) or getattr(index, "ndim", 0) > 0
        if self.single and not several:
            raise BatchError(
                f"data['{self.level}'] has batch_size=None and a sampler that gives one index for a whole batch "
                f"({index!r}), which {self.size} processes cannot share: give the DataLoader a batch_size."
            )
        whole = index if several else [*index]
        if len(whole) < self.size:
            raise BatchError(
                f"batch {number + 1} of level '{self.level}' has {len(whole)} examples for {self.size} processes, of which "
                "each needs one: give the DataLoader drop_last=True, or a larger batch_size."
            )
        return whole[part(len(whole), self.rank, self.size)]


def _read(*owners: Any) -> list[Any]:
    """Samplers, and the samplers that they read."""
    found, ahead = list[Any](), list(owners)
    while ahead:
        x = ahead.pop()
        if all(x is not y for y in found):
            found.append(x)
            held = getattr(x, "__dict__", {})
            ahead.extend(held[name] for name in ("sampler", "batch_sampler") if held.get(name) is not None)
    return found


def _length(sampler: Any) -> int | None:
    """How many lists each epoch has, where that is known without making them."""
    read = sampler.sampler if type(sampler) is BatchSampler else sampler
    return len(sampler) if type(read) in _STEADY else None


def _nothing(level: str, sampler: Any, epoch: int) -> str:
    """Say that an epoch was empty."""
    if epoch:
        return (
            f"the sampler of data['{level}'] ({type(sampler).__name__}) gives nothing in epoch {epoch + 1}: expected one "
            "that can be gone through again and again."
        )
    dropped = " (drop_last=True drops a batch that is not full)" if getattr(sampler, "drop_last", False) else ""
    return f"data['{level}'] is a DataLoader without a batch{dropped}: expected at least one."
