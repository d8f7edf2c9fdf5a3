"""Loaders that go on for ever: a DataLoader's own settings around an order that follows from a seed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate, default_convert, get_worker_info

from funcmlo.train.generators import drawing, generators
from funcmlo.train.order import Draw, Order


def is_plain(loader: DataLoader[Any]) -> bool:
    """Return whether a loader loads as torch's own class does.

    Args:
        loader: a loader.

    Returns:
        False for classes that do so by a method of their own.
    """
    kind = type(loader)
    return kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator


def loaded(loader: DataLoader[Any], level: str, drawn: int, *, seed: int, rank: int, size: int, pin: bool) -> Generator[Any]:
    """Load the batches of a loader, epoch after epoch, without end.

    Whatever the dataset and `collate_fn` draw for a batch follows from the seed and the batch's number, with workers and
    without.

    Args:
        loader: the loader, of a dataset with indices.
        level: whose batches they are.
        drawn: how many batches were drawn before; they are not loaded.
        seed: where all randomness comes from.
        rank: this process's number.
        size: how many processes share each batch.
        pin: whether pinned memory is of use.

    Yields:
        The batches.

    Raises:
        Exception: what the sampler, the dataset or `collate_fn` raises.
    """
    order = Order(loader, level, seed, drawn, rank, size)
    iterator = iter(
        again(
            loader,
            seed,
            pin,
            dataset=_Batches(loader),
            batch_size=None,
            sampler=order,
            collate_fn=_as_it_is,
            worker_init_fn=_Beginning(loader.worker_init_fn),
        )
    )
    try:
        yield from iterator
        raise order.failure or RuntimeError("the loader ended")
    finally:
        end(iterator)


def again(loader: DataLoader[Any], seed: int, pin: bool, **changed: Any) -> DataLoader[Any]:
    """Make a loader with the settings of another.

    Args:
        loader: the other.
        seed: where the seeds of its workers come from.
        pin: whether pinned memory is of use.
        **changed: settings that differ.

    Returns:
        The loader. Its batches come in order.
    """
    names = ("dataset", "num_workers", "collate_fn", "timeout", "worker_init_fn", "multiprocessing_context")
    settings = {name: getattr(loader, name) for name in (*names, "prefetch_factor", "pin_memory_device")}
    settings |= {"pin_memory": pin and loader.pin_memory, "generator": torch.Generator().manual_seed(seed)}
    return DataLoader(**settings | changed)


def end(iterator: Any) -> None:
    """End the workers of a loader's iterator now, and not when the last traceback that holds it is gone."""
    shut_down: Callable[[], None] | None = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


class _Batches(Dataset[Any]):
    """A dataset of whole batches: an item is what a loader makes of a list of its indices."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset: Any = loader.dataset
        self.collate: Callable[[Any], Any] = loader.collate_fn
        self.single = loader.batch_sampler is None
        self.held = generators(loader.dataset, loader.collate_fn)
        self.draws = not (_draws_nothing(loader.dataset) and loader.collate_fn in (default_collate, default_convert))

    def __getitem__(self, draw: Draw) -> Any:
        with drawing(draw.seed, self.held) if self.draws else nullcontext():
            try:
                return self.collate(self._examples(draw.index))
            except StopIteration as error:  # which would look like the loader's end
                raise RuntimeError("StopIteration came out of the dataset or of collate_fn") from error

    def _examples(self, index: Any) -> Any:
        if self.single:
            return self.dataset[index]
        together = getattr(self.dataset, "__getitems__", None)
        return together(index) if together else [self.dataset[i] for i in index]


class _Beginning:
    """What a worker does first: the user's dataset is the one that `get_worker_info` tells, then their own function."""

    def __init__(self, function: Callable[[int], None] | None) -> None:
        self.function = function

    def __call__(self, worker: int) -> None:
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.function is not None:
            self.function(worker)


def _draws_nothing(dataset: Any) -> bool:
    """Whether it is one of torch's own datasets that only look up; to seed costs as much as to look up a dozen examples."""
    return type(dataset) is TensorDataset or (type(dataset) is Subset and _draws_nothing(dataset.dataset))


def _as_it_is(batch: Any) -> Any:
    return batch
