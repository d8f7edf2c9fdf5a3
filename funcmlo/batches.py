"""Batches: what `batches[level]` may be, and how an inner loop asks for the one of its step.

A fixed batch (any object), an indexed source (a callable: step → batch), or an iterator (one batch per step). The
index is the level's own step counter, so an indexed source gives the same batch whenever that step is run again.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from funcmlo import _tracing, _tree
from funcmlo.errors import BatchError, listing, suggest
from funcmlo.level import Level
from funcmlo.tasks import Shared


class Microbatches(Sequence[Any]):
    """The parts of a batch that is too large to be evaluated at once: a cost is their mean, weighted by their examples.

    A level's own gradient is taken part by part, with the memory of one. Estimators take their derivatives of the whole
    cost, with the graphs of all parts. Buffers move on from part to part, and each part draws numbers of its own.

    Args:
        parts: batches whose first tensors tell by their first axis how many examples they have.

    Raises:
        BatchError: there is none.

    Example:
        The mean of 1, 2 and 6:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(fm.Level("y", lambda y, batch: (y * batch).mean(), torchopt.sgd(1.0)))
        >>> state = program.init({"y": torch.zeros(())})
        >>> state, _ = program.step(state, {"y": fm.Microbatches([torch.tensor([1.0, 2.0]), torch.tensor([6.0])])})
        >>> state.params["y"]
        tensor(-3.)
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        if not self.parts:
            raise BatchError("Microbatches([]): expected at least one batch.")
        self.sizes = tuple(examples(part) for part in self.parts)

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self.parts)

    def __getitem__(self, index: Any) -> Any:
        """Return a part."""
        return self.parts[index]

    def __repr__(self) -> str:
        """Tell the parts' sizes."""
        return f"Microbatches({' + '.join(map(str, self.sizes))} examples)"


def examples(batch: Any) -> int:
    """Return how many examples a batch has: the first axis of its first tensor that has one; else 1."""
    if isinstance(batch, Microbatches):
        return sum(batch.sizes)
    return next((x.shape[0] for x in _tree.leaves(batch) if isinstance(x, Tensor) and x.dim()), 1)


class Feed(Protocol):
    """t ↦ the batch of a level's step t."""

    def __call__(self, t: int) -> Any:
        """Return the batch of step t, counted from the level's first step ever."""


def feeds(
    levels: Sequence[Level],
    names: Sequence[str],
    batches: Mapping[str, Any],
    start: Mapping[str, int],
    *,
    pure: bool,
    tasks: Container[str] = (),
) -> dict[str, Feed]:
    """Turn what the user gave into one feed per level.

    Args:
        levels: the levels that will run.
        names: the names of all the program's levels.
        batches: by level name; levels whose loss takes no batch may be left out.
        start: the step that each level makes next.
        pure: whether the call must leave no trace, so that iterators are refused.
        tasks: the levels that have to do with tasks.

    Returns:
        A feed for every level that will run.

    Raises:
        BatchError: a batch is missing, belongs to no level, or is of a kind that cannot be used here.
    """
    if not isinstance(batches, Mapping):
        raise BatchError(f"batches came as {type(batches).__name__}; expected a dict from level names to batches.")
    for name in batches:
        if name not in names:
            raise BatchError(f"batches names '{name}', which is no level{suggest(name, names)} Levels: {listing(names)}.")
    return {x.name: _feed(x, batches, start[x.name], pure=pure, with_tasks=x.name in tasks) for x in levels}


def _feed(level: Level, batches: Mapping[str, Any], start: int, *, pure: bool, with_tasks: bool) -> Feed:
    name = level.name
    if name not in batches:
        if level.takes_batch:
            raise BatchError(f"level '{name}' takes a batch, but none came: pass batches={{'{name}': …}}.")
        return Fixed(None)
    given = batches[name]
    if level.has_constant_batch and given is not None:
        raise BatchError(
            f"batches['{name}'] came, but the loss of level '{name}' gives its batch a default, which makes it a constant; "
            "take the default away."
        )
    if isinstance(given, Shared) and not with_tasks:
        raise BatchError(
            f"batches['{name}'] is fm.Shared, but level '{name}' has no tasks and reads none; pass the batch itself."
        )
    if isinstance(given, DataLoader):
        raise BatchError(
            f"batches['{name}'] is a DataLoader, which is no iterator: pass iter(loader) to step, one batch of it, or a "
            "function from the step's number to a batch."
        )
    if isinstance(given, Dataset):
        raise BatchError(
            f"batches['{name}'] is a Dataset ({type(given).__name__}); pass a batch, an iterator over batches, or a "
            "function from the step's number to a batch."
        )
    if isinstance(given, Iterator):
        if pure:
            raise BatchError(
                f"batches['{name}'] is an iterator, but hypergradient is pure and would use it up: pass a fixed batch or "
                "a function from the step's number to a batch."
            )
        return _Sequential(name, given, start)
    if callable(given):
        return _Indexed(given)
    return Fixed(given)


class Fixed:
    """A feed that gives the same batch at every step."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __call__(self, t: int) -> Any:
        """Return the batch."""
        return self._batch


def is_fixed(given: Any) -> bool:
    """Say whether what the user gave for a level is one batch, a tree of tensors, for all its steps."""
    return not (callable(given) or isinstance(given, (Iterator, DataLoader, Dataset, Shared, Microbatches)))


class _Indexed:
    """An indexed source behind a feed: the last batch is kept, because estimators ask for it again and again.

    So a source that draws at random gives one batch per step to those who look at the last step; who makes earlier steps
    again asks for their batches again, and must get the same.
    """

    def __init__(self, source: Feed) -> None:
        self._source = source
        self._mapped = _tracing.transforming()
        self._last: tuple[int, Any] | None = None

    def __call__(self, t: int) -> Any:
        if self._last is None or self._last[0] != t:
            # Kept longer than the derivative or the map that asks for it: what is made inside of one must not stay there.
            made = _outside(self._source(t)) if self._mapped else _tracing.call_outside(self._source, t)
            self._last = (t, made)
        return self._last[1]


class _Sequential:
    """An iterator behind a feed: each batch is drawn once and kept until `forget` says that its step is over."""

    def __init__(self, level: str, iterator: Iterator[Any], start: int) -> None:
        self._level, self._iterator = level, iterator
        self._mapped = _tracing.transforming()
        self._kept: dict[int, Any] = {}
        self._first = self._next = start

    def __call__(self, t: int) -> Any:
        t = max(t, self._first)  # a level without inner steps asks for its last batch, which is gone: give the next
        while self._next <= t:
            try:
                # Outside of the map over tasks, which makes of what is drawn something else.
                drawn = next(self._iterator) if self._mapped else _tracing.call_outside(next, self._iterator)
                self._kept[self._next] = drawn
            except StopIteration:
                drawn = self._next - self._first
                raise BatchError(
                    f"the iterator of level '{self._level}' ended after {drawn} batches, but step {t - self._first + 1} "
                    "of this call needs another; one outer step takes `steps` of them, "
                    "and an estimator that resamples more. The state is unchanged; the "
                    f"{drawn} batches drawn are gone. Pass a longer or an endless iterator (itertools.cycle)."
                ) from None
            self._next += 1
        if t not in self._kept:
            raise BatchError(
                f"the batch of step {t} of level '{self._level}' came from an iterator and is gone; an estimator that runs "
                'inner steps again must say requires = "replay".'
            )
        return self._kept[t]

    def forget(self, before: int) -> None:
        """Let go of the batches of earlier steps."""
        for t in [t for t in self._kept if t < before]:
            del self._kept[t]


def forget(feed: Feed, before: int) -> None:
    """Tell a feed that steps before this one will not be asked for again."""
    if isinstance(feed, _Sequential):
        feed.forget(before)


def _outside(batch: Any) -> Any:
    """A batch whose tensors are outside of the torch.func levels that are being differentiated."""
    if not _tracing.transforming():
        return batch
    return _tree.map_tensors(lambda x: x if _tracing.traced(x) else _tracing.untracked(x), batch)
