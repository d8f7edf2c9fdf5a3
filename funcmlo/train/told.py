"""A run's callbacks together; of several processes the first one calls, and all hear whether to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcmlo.sharing import summed
from funcmlo.state import State
from funcmlo.train.callbacks import Start


class Told:
    """A run's callbacks.

    Args:
        callbacks: objects with `begin`, `record` and `end`.
        rank: this process.
        size: how many work together.
    """

    def __init__(self, callbacks: Sequence[Any], rank: int = 0, size: int = 1) -> None:
        self._callbacks = callbacks if rank == 0 else ()
        self._size = size
        self._interrupted = False
        self._begun: list[Any] = []

    def begin(self, start: Start) -> None:
        """Tell that the run begins."""
        for callback in self._callbacks:
            self._begun.append(callback)
            callback.begin(start)

    def record(self, step: int, row: Mapping[str, float], state: State) -> str | None:
        """Tell of a step; return why the run is to stop, if it is."""
        stops = [callback for callback in self._callbacks if callback.record(step, row, state)]
        stop = bool(stops) or self._interrupted
        if self._size > 1:  # all of them stop after the same step
            wanted = summed(torch.tensor([float(bool(stops)), float(self._interrupted)]))
            stop, self._interrupted = bool(wanted.any()), bool(wanted[1])
        if not stop:
            return None
        if self._interrupted:
            return "interrupted"
        return f"by {', '.join(str(callback) for callback in stops)}" if stops else "by a callback"

    def interrupt(self) -> None:
        """Ask for the run to stop after its next step, in all processes."""
        self._interrupted = True

    def end(self, state: State, error: BaseException | None) -> None:
        """Tell that the run is over, everyone who was told that it began; then raise what the first of them raised."""
        first: BaseException | None = None
        for callback in self._begun:
            try:
                callback.end(state, error)
            except Exception as raised:
                first = first or raised
        if first is not None and error is None:
            raise first
