"""A run's rows for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from funcmlo.state import State
from funcmlo.train.callbacks import Callback, Start, check_every, check_package


class TensorBoardLogger(Callback):
    """Writes the rows as scalars that `tensorboard --logdir FOLDER` shows; needs the package `tensorboard`.

    Args:
        folder: where the event files go.
        every: outer steps between two points.

    Raises:
        DefinitionError: the package is absent, or every is no positive integer.

    References:
        torch.utils.tensorboard.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 1) -> None:
        check_package("TensorBoardLogger", "tensorboard", "tensorboard")
        self.folder, self.every = os.fspath(folder), check_every("TensorBoardLogger", every)
        self._writer: Any = None

    def begin(self, start: Start) -> None:
        """Open a file; of a run that goes on, points after where it does are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        purge = start.begun + 1 if start.begun else None
        self._writer = SummaryWriter(self.folder, purge_step=purge)
        lines = [f"    {line}" for line in (start.program, *start.settings.values())]
        self._writer.add_text("program", "\n".join(lines), start.begun)

    def record(self, step: int, row: Mapping[str, float], state: State) -> None:
        """Write a point for each number."""
        for name, value in row.items() if not step % self.every else ():
            self._writer.add_scalar(name, value, step)

    def end(self, state: State, error: BaseException | None) -> None:
        """Close the file, and say there why the run failed."""
        if self._writer is None:
            return
        if error is not None:
            self._writer.add_text("error", f"{type(error).__name__}: {error}")
        self._writer.close()
