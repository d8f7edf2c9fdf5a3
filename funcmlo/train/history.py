"""The history of a run: a row of numbers for each outer step, in memory and on disk."""

from __future__ import annotations

import functools
import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcmlo.errors import CheckpointError

if TYPE_CHECKING:
    from pandas import DataFrame


class History:
    """Rows of numbers, eight bytes each.

    Example:
        >>> history = History()
        >>> history.append(1, {"x/cost": 0.5})
        >>> history.append(2, {"x/cost": 0.25, "valid": 1.0})
        >>> len(history), list(history.rows())
        (2, [(1, {'x/cost': 0.5}), (2, {'x/cost': 0.25, 'valid': 1.0})])
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self.steps)

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row.

        Args:
            step: the outer steps made.
            row: numbers by column; columns may be missing, or new.
        """
        for name in row:
            if name not in self.columns:
                self.columns[name] = array("d", [math.nan]) * len(self.steps)
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(row.get(name, math.nan))

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Go through the rows: (step, the numbers that are there)."""
        for i, step in enumerate(self.steps):
            yield step, {name: column[i] for name, column in self.columns.items() if not math.isnan(column[i])}

    def frame(self, **attributes: Any) -> DataFrame:
        """Return the rows as a pandas frame.

        Args:
            **attributes: what goes into its `attrs`.

        Returns:
            A frame indexed by "step", with a column for each number; NaN where a row has none.
        """
        import pandas as pd

        index = pd.Index(list(self.steps), name="step", dtype="int64")
        frame: DataFrame = frame_class()({name: list(column) for name, column in self.columns.items()}, index=index)
        frame.attrs.update(attributes)
        return frame


@functools.cache
def frame_class() -> type[DataFrame]:
    """Return the class of a history's frame, made when it is first asked for, since pandas takes half a second to import."""
    import pandas as pd

    class HistoryFrame(pd.DataFrame):  # type: ignore[misc]
        """A run's history: a pandas frame that draws itself."""

        @property
        def _constructor(self) -> type[DataFrame]:
            return HistoryFrame

        def figure(self) -> Any:
            """Return a matplotlib figure of costs, norms, residuals and validation against the outer step."""
            from funcmlo.train.history_figure import figure

            return figure(self)

    HistoryFrame.__qualname__ = "HistoryFrame"
    return HistoryFrame


class HistoryFile:
    """Rows on disk, a line each.

    Args:
        path: the file, which is gone on with if it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "a", encoding="utf-8")  # ruff: ignore[open-file-with-context-handler]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written ({error.strerror}).") from error

    def append(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row."""
        self._writing(lambda: self._file.write(json.dumps({"step": step, **row}) + "\n"))

    def sync(self) -> None:
        """Let all rows reach the disk."""
        self._writing(self._file.flush)
        self._writing(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        """Close the file."""
        self._writing(self._file.close)

    def _writing(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}): make room there; the checkpoints are as they were."
            ) from error

    @staticmethod
    def read(path: Path, *, until: int, write: bool = True) -> list[tuple[int, dict[str, float]]]:
        """Return the rows up to a step, and let go of others and of a line that was not finished.

        Args:
            path: the file; none is as an empty one.
            until: the last step.
            write: whether the file is rewritten without what is let go of.

        Returns:
            (step, row) for each.

        Raises:
            CheckpointError: it cannot be read or written.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
            rows = [row for line in lines if (row := _parsed(line)) is not None and row[0] <= until]
            kept = "".join(json.dumps({"step": step, **row}) + "\n" for step, row in rows)
            if write and path.exists() and kept != "\n".join(lines):
                new = path.with_name(f".{path.name}.new")
                new.write_text(kept, encoding="utf-8")
                new.replace(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read and cut to step {until} ({error.strerror}).") from error
        return rows


def _parsed(line: str) -> tuple[int, dict[str, float]] | None:
    try:
        row = json.loads(line)
        return int(row.pop("step")), {name: float(value) for name, value in row.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
