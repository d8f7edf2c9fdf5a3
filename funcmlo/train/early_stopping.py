"""Ending a run when a number no longer gets better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from funcmlo.errors import DefinitionError, FuncmloWarning, listing, suggest
from funcmlo.state import State
from funcmlo.train.callbacks import Callback, Start


@dataclass
class EarlyStopping(Callback):
    """Ends a run when a column of its history has not got better for some rows.

    A run that goes on from a checkpoint ends where it would have ended in one go. A NaN is no improvement.

    Args:
        metric: the column, such as `"valid"` or `"weights/cost"`; only rows that have it count.
        patience: how many rows may come without a better value.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better.
        min_delta: by how much a value must be better than the best one.

    Raises:
        DefinitionError: a setting has no meaning.

    Example:
        >>> import math
        >>> stopping = EarlyStopping("valid", patience=2)
        >>> [stopping.record(t, {"valid": value}, None) for t, value in enumerate([3.0, 2.0, math.nan, 2.5])]
        [False, False, False, True]
    """

    metric: str
    patience: int = 5
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    _best: float = field(default=math.nan, init=False, repr=False)
    _waited: int = field(default=0, init=False, repr=False)
    _seen: set[str] = field(default_factory=set, init=False, repr=False)
    _heard: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        if not isinstance(self.metric, str):
            raise DefinitionError(f"EarlyStopping(metric={self.metric!r}): expected a column's name, such as 'valid'.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise DefinitionError(f"EarlyStopping(patience={self.patience!r}): expected an integer of at least 1.")
        if self.mode not in ("min", "max"):
            raise DefinitionError(f"EarlyStopping(mode={self.mode!r}): expected 'min' or 'max'.")
        if not isinstance(self.min_delta, (int, float)) or not 0 <= self.min_delta < math.inf:
            raise DefinitionError(f"EarlyStopping(min_delta={self.min_delta!r}): expected a number of at least 0.")

    def begin(self, start: Start) -> None:
        """Begin to count, with the rows of before."""
        self._best, self._waited, self._heard, self._seen = math.nan, 0, False, set()
        for step, row in start.history.rows():
            self._count(step, row)

    def record(self, step: int, row: Mapping[str, float], state: State) -> bool:
        """Say whether the run is to end."""
        self._count(step, row)
        return self._waited >= self.patience

    def end(self, state: State, error: BaseException | None) -> None:
        """Say if the column never was."""
        if not self._heard and self._seen and error is None:
            warnings.warn(
                f"EarlyStopping: no row of the history has '{self.metric}'{suggest(self.metric, self._seen)} There are "
                f"{listing(sorted(self._seen))}.",
                FuncmloWarning,
                stacklevel=2,
            )

    def _count(self, step: int, row: Mapping[str, float]) -> None:
        if self.metric not in row:
            if not self._heard:
                self._seen.update(row)
            return
        self._heard = True
        value = row[self.metric] if self.mode == "min" else -row[self.metric]
        if value < self._best - self.min_delta or (math.isnan(self._best) and not math.isnan(value)):
            self._best, self._waited = value, 0
        else:
            self._waited += 1

    def __str__(self) -> str:
        """Say what it waits for."""
        return f"early stopping: '{self.metric}' no better for {self.patience} rows"
