"""A run's rows as a table for a spreadsheet."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funcmlo.errors import DefinitionError
from funcmlo.state import State
from funcmlo.train.callbacks import Callback, Start, check_every


class CSVLogger(Callback):
    """Writes a file with a line for each outer step: its number first, then a column for each number.

    A column that appears later makes the file be written anew, with empty cells before. A run that goes on from a checkpoint
    goes on in the file, without the lines after that.

    Args:
        path: the file; its folder is made.
        every: outer steps between two lines.

    Raises:
        DefinitionError: every is no positive integer.

    Example:
        >>> import tempfile, pathlib, torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), torchopt.sgd(0.25)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "log.csv")
        ...     state = program.init({"y": torch.ones(())})
        ...     _ = program.run(state, {}, steps=2, callbacks=[CSVLogger(path)], progress=False)
        ...     print([line.split(",")[:2] for line in path.read_text().splitlines()])
        [['step', 'y/cost'], ['1', '1.0'], ['2', '0.25']]
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        self.path, self.every = Path(path), check_every("CSVLogger", every)
        self._columns: list[str] = []
        self._file: Any = None

    def begin(self, start: Start) -> None:
        """Open the file; of an earlier run keep what is before."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            if start.begun and self.path.exists():
                with open(self.path, newline="", encoding="utf-8") as file:
                    read = csv.DictReader(file)
                    whole = [row for row in read if (row.get("step") or "").isdecimal()]
                    rows = [row for row in whole if int(row["step"]) <= start.begun]
                    self._columns = [name for name in read.fieldnames or () if name != "step"]
            self._rewrite(rows)
        except OSError as error:
            raise DefinitionError(
                f"CSVLogger({str(self.path)!r}): the file cannot be written ({error.strerror})."
            ) from error

    def record(self, step: int, row: Mapping[str, float], state: State) -> None:
        """Write a line."""
        if step % self.every:
            return
        if new := [name for name in row if name not in self._columns]:
            self._file.close()
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self._columns += new
            self._rewrite(rows)
        csv.writer(self._file).writerow([step, *(row.get(name, "") for name in self._columns)])
        self._file.flush()

    def end(self, state: State, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Write the file anew, in one go, and leave it open at its end."""
        new = self.path.with_name(f".{self.path.name}.new")
        with open(new, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *self._columns])
            writer.writerows([row["step"], *(row.get(name) or "" for name in self._columns)] for row in rows)
        new.replace(self.path)
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # ruff: ignore[open-file-with-context-handler]
