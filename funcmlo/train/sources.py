"""What `run`'s data may be, as `step` takes it: streams without end that know how far they have been drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from funcmlo import _tree
from funcmlo.batches import Microbatches
from funcmlo.errors import BatchError
from funcmlo.tasks import Shared
from funcmlo.train.cycle import Cycle
from funcmlo.train.loaders import is_plain, loaded

Begin: TypeAlias = Callable[[int], Generator[Any]]
"""n ↦ the batches that follow the first n."""


class Source(Iterator[Any]):
    """A level's batches, without end.

    After an exception, or after `close`, the next batch is loaded anew.

    Args:
        level: the level.
        begin: n ↦ the batches that follow the first n.
        device: where they are moved to.
        drawn: how many were given out before.
        non_blocking: whether a batch's memory is its own, so that it can be copied while the program goes on.

    Attributes:
        drawn: how many batches were given out so far.
    """

    def __init__(
        self,
        level: str,
        begin: Begin,
        device: torch.device,
        drawn: int,
        *,
        non_blocking: bool = False,
    ) -> None:
        self.level, self.drawn = level, drawn
        self._begin, self._device, self._non_blocking = begin, device, non_blocking
        self._stream: Generator[Any] | None = None

    def __next__(self) -> Any:
        """Return the next batch, on the device."""
        try:
            batch = moved(self._load(), self._device, non_blocking=self._non_blocking)
        except BaseException:  # the stream may be ahead of what was given out
            self.close()
            raise
        self.drawn += 1
        return batch

    def close(self) -> None:
        """End the workers."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _load(self) -> Any:
        try:
            if self._stream is None:
                self._stream = self._begin(self.drawn)
            return next(self._stream)
        except BatchError:
            raise
        except Exception as error:
            raise BatchError(
                f"batch {self.drawn + 1} of level '{self.level}' cannot be drawn from its data: {_told(error)}."
            ) from error


def source(level: str, given: Any, *, seed: int, device: torch.device, drawn: int = 0, rank: int = 0, size: int = 1) -> Any:
    """Turn what the user gave for a level into what `step` takes for it.

    - A `DataLoader` is cycled. The order of each epoch follows from the seed, and so does what the dataset and `collate_fn`
      draw (by torch's, Python's and numpy's default generators and by those that samplers and datasets hold as attributes)
      for each batch; neither depends on what ran before, nor on the number of workers. All generators stay as they are.
      Samplers with a `set_epoch` hear the epoch's number; one that keeps something else from epoch to epoch does so here.
    - A loader over an `IterableDataset` and any other iterable is begun again when it ends.
    - The batches of a function of the step are moved to the device.
    - Anything else is a fixed batch.

    Args:
        level: the level's name.
        given: the user's loader, iterable, function of the level's step or fixed batch.
        seed: where all randomness comes from.
        device: where batches are moved to: every tensor of a tree of dicts, tuples and lists.
        drawn: how many batches were drawn before. A loader over indices passes over them without loading them; of
            others they are drawn and dropped.
        rank: this process's number.
        size: how many processes share each batch of a loader over indices; consecutive examples are one's part. Other data,
            and loaders with a `DistributedSampler`, are as they are.

    Returns:
        A `Source`, a function of the step or a batch.

    Raises:
        BatchError: it is a dataset, which has no batches.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=4, shuffle=True)
        >>> batches = source("weights", loader, seed=0, device=torch.device("cpu"))
        >>> [sorted(x.tolist()) for (x,) in (next(batches), next(batches))], batches.drawn
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 2)
    """
    if isinstance(given, DataLoader) and is_plain(given):
        pin = device.type != "cpu"
        if isinstance(given.dataset, IterableDataset):
            begin: Begin = Cycle(level, given, seed, pin=pin)
        else:
            begin = partial(loaded, given, level, seed=seed, rank=rank, size=size, pin=pin)
        return Source(level, begin, device, drawn, non_blocking=True)
    if isinstance(given, Dataset):
        raise BatchError(
            f"data['{level}'] is a Dataset ({type(given).__name__}), which has no batches: wrap it in a DataLoader, "
            "DataLoader(dataset, batch_size=…, shuffle=True)."
        )
    if callable(given) and not isinstance(given, Iterator):
        return lambda t: moved(given(t), device)
    if isinstance(given, Iterator) or (hasattr(given, "__iter__") and not _is_batch(given)):
        return Source(level, Cycle(level, given, seed), device, drawn)
    return moved(given, device)


def moved(batch: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Return a batch on a device.

    Args:
        batch: a tree; `fm.Shared` and `fm.Microbatches` hold trees, and leaves that are no tensors stay as they are.
        device: the device.
        non_blocking: whether a copy from the CPU may go on after the return.

    Returns:
        The batch; tensors that are there already are the same objects.
    """

    def put(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking and leaf.device.type == "cpu")
        if isinstance(leaf, Shared):
            return Shared(_tree.map(put, leaf.batch))
        if isinstance(leaf, Microbatches):
            return Microbatches([_tree.map(put, part) for part in leaf.parts])
        return leaf

    return _tree.map(put, batch)


def _is_batch(given: Any) -> bool:
    """Whether what can be iterated over is one batch: a container of trees, a tensor, an array."""
    leaf = [*map(id, _tree.leaves(given))] == [id(given)]
    return not leaf or isinstance(given, (Tensor, Microbatches, Mapping, str, bytes)) or hasattr(given, "__array__")


def _told(error: Exception) -> str:
    """The kind and the text of an exception; of one that a worker passed on, without the worker's traceback."""
    text = str(error).strip()
    if "in DataLoader worker process" in text:
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
