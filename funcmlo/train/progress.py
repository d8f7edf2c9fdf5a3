"""A run's progress bar."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from funcmlo.state import State
from funcmlo.table import number
from funcmlo.train.callbacks import Callback, Start


class Progress(Callback):
    """A bar of the steps made, with the top levels' costs and what validation said last.

    Args:
        tops: the top levels.
    """

    def __init__(self, tops: Sequence[str]) -> None:
        self._costs = {f"{top}/cost": top for top in tops}
        self._bar: Any = None
        self._valid: dict[str, float] = {}
        self._plain: set[str] = set()

    def begin(self, start: Start) -> None:
        """Show it."""
        self._levels = tuple(f"{level}/" for level in start.levels)
        # Where there are no widgets a notebook's bar is a warning and a line of text: the plain bar is better.
        if importlib.util.find_spec("ipywidgets") is not None:
            from tqdm.auto import tqdm
        else:
            from tqdm.std import tqdm
        self._bar = tqdm(total=start.steps, initial=start.begun, unit="step", dynamic_ncols=True, mininterval=0.2)

    def record(self, step: int, row: Mapping[str, float], state: State) -> None:
        """Move on."""
        for name, value in row.items():
            if name not in _OWN and not name.startswith(self._levels):
                self._valid[name] = value
        if self._bar.update(1):  # it was drawn: what it says then is what comes next
            shown = {name: row[column] for column, name in self._costs.items() if column in row} | self._valid
            self._bar.set_postfix({name: number(value) for name, value in shown.items()}, refresh=False)

    def end(self, state: State, error: BaseException | None) -> None:
        """Leave it as it is."""
        if self._bar is not None:
            self._bar.close()


_OWN = ("seconds", "memory", "skipped")
