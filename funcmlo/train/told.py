"""A run's callbacks together; of several processes the first one calls, and all hear whether to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from funcmlo.sharing import summed, who
from funcmlo.state import State
from funcmlo.train.callbacks import Start


class Told:
    """A run's callbacks.

    Args:
        callbacks: objects with `begin`, `record` and `end`.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = callbacks if who()[0] == 0 else ()
        self._asked = bool(callbacks)
        self._begun: list[Any] = []

    def begin(self, start: Start) -> None:
        """Tell that the run begins."""
        for callback in self._callbacks:
            self._begun.append(callback)
            callback.begin(start)

    def record(self, step: int, row: Mapping[str, float], state: State) -> str | None:
        """Tell of a step; return why the run is to stop, if it is."""
        stops = [callback for callback in self._callbacks if callback.record(step, row, state)]
        together = who()[1] > 1 and self._asked
        if not (bool(summed(torch.tensor([float(len(stops))]))) if together else stops):
            return None
        return f"by {', '.join(str(callback) for callback in stops)}" if stops else "by a callback"

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
