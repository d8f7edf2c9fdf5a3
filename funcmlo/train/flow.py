"""The data of a run: what `step` takes for each level, and how far each has been drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.batches import Microbatches
from funcmlo.errors import BatchError
from funcmlo.sharing import Sharing
from funcmlo.state import State
from funcmlo.train.sources import Source, source


@dataclass(frozen=True)
class Flow:
    """The data of a run.

    Attributes:
        batches: what `step` takes, by level.
        sources: the streams among them.
    """

    batches: dict[str, Any]
    sources: dict[str, Source]

    @staticmethod
    def of(
        data: Mapping[str, Any],
        state: State,
        accumulate: Mapping[str, int],
        drawn: Mapping[str, int] | None,
        sharing: Mapping[str, Sharing],
    ) -> Flow:
        """Set up the data of a run.

        Args:
            data: loaders, iterables, functions of the step or fixed batches, by level.
            state: where the program stands.
            accumulate: how many batches make one, by level.
            drawn: how many batches of each level were drawn before, where a run goes on; else the levels' step counters
                tell, except for iterators, which stand where they are.
            sharing: what the processes share of the levels.

        Returns:
            The flow.

        Raises:
            BatchError: a level's data cannot be used.
        """
        batches, sources = {}, dict[str, Source]()
        for name, given in data.items():
            m = accumulate.get(name, 1)
            so_far = 0 if isinstance(given, Iterator) else state.step[name] * m
            before = so_far if drawn is None else drawn.get(name, 0)
            shared = sharing.get(name)
            split = (shared.rank, shared.size) if shared is not None and shared.kind != "samples" else (0, 1)
            at = device_of(state.params[name])
            made = source(name, given, seed=state.seed, device=at, drawn=before, rank=split[0], size=split[1])
            if isinstance(made, Source):
                sources[name] = made
            batches[name] = made if m == 1 else _several(name, made, m)
        return Flow(batches, sources)

    def drawn(self) -> dict[str, int]:
        """Return how many batches were drawn, by level."""
        return {name: source.drawn for name, source in self.sources.items()}

    def close(self) -> None:
        """End the loaders' workers."""
        for stream in self.sources.values():
            stream.close()


def device_of(tree: Tree) -> torch.device:
    """Return the device of a tree's first tensor; the CPU without any."""
    return next((x.device for x in _tree.leaves(tree) if isinstance(x, torch.Tensor)), torch.device("cpu"))


def _several(level: str, made: Any, m: int) -> Any:
    """Several batches in place of each."""
    if isinstance(made, Source):
        return _packed(made, m)
    if callable(made):
        return lambda t: Microbatches([made(m * t + i) for i in range(m)])
    raise BatchError(
        f"run(accumulate={{'{level}': {m}}}): the data of level '{level}' are one fixed batch; expected a loader, an "
        "iterable or a function of the step, or fm.Microbatches([…]) with the parts of the batch."
    )


def _packed(stream: Source, m: int) -> Iterator[Microbatches]:
    while True:
        yield Microbatches([next(stream) for _ in range(m)])
