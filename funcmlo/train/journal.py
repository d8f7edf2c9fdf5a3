"""Where a run is kept: its checkpoints and its history, on disk, so that it goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from funcmlo import _tree
from funcmlo.errors import FuncmloError, ProcessError
from funcmlo.roles import Roles
from funcmlo.sharing import told_by_all
from funcmlo.state import State
from funcmlo.train import checkpoint
from funcmlo.train.durable import make_folder
from funcmlo.train.fitting import taken_apart
from funcmlo.train.history import History, HistoryFile
from funcmlo.train.places import explained, step_of

ROWS = "history.jsonl"


@dataclass
class Journal:
    """Where a run is kept; nowhere, without a folder.

    Attributes:
        folder: the folder of checkpoints; None for none.
        every: outer steps between two of them.
        keep: how many of them stay.
        roles: what the levels have to do with other processes, of which the first one writes.
        saved: the step of the last checkpoint.
    """

    folder: Path | None
    every: int
    keep: int
    roles: Roles
    saved: int | None = None
    _rows: HistoryFile | None = field(default=None, repr=False)
    _apart: bool = field(default=False, repr=False)
    """Whether the processes were found to hold different numbers, of which none is to be kept."""

    def begin(self, state: State) -> tuple[State, int, dict[str, int] | None, History]:
        """Find where the run stands.

        Args:
            state: the state that the user gave, which stands for the program.

        Returns:
            The state, the outer steps made, the batches drawn by level (None for a run that begins), and the rows so far.

        Raises:
            CheckpointError: the newest checkpoint is damaged, or does not fit the program.
            ProcessError: the processes do not see the same folder.
        """
        if self.folder is None:
            return state, 0, None, History()
        taken_apart(self.roles.gathered(state))  # what no file can keep is told now
        rank, size = self.roles.who()
        if rank == 0:
            with explained(f"{self.folder} cannot be a folder of checkpoints"):
                make_folder(self.folder)
            checkpoint.clear(self.folder)
        found = checkpoint.newest(self.folder) if rank == 0 or self.folder.exists() else None
        steps = 0 if found is None else step_of(found) or 0
        if size > 1:
            _agree(self.folder, steps)
        history, drawn = History(), None
        if found is not None:
            stored = checkpoint.load(found, like=self.roles.gathered(state))
            state, drawn, self.saved = self.roles.mine(stored.state), stored.positions, steps
        if rank == 0 or found is not None:
            for step, row in HistoryFile.read(self.folder / ROWS, until=steps, write=rank == 0):
                history.append(step, row)
        if rank == 0:
            self._rows = HistoryFile(self.folder / ROWS)
        return state, steps, drawn, history

    def record(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row of the history."""
        if self._rows is not None:
            self._rows.append(step, row)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after a step."""
        return self.folder is not None and step % self.every == 0

    def save(self, state: State, step: int, drawn: Mapping[str, int]) -> None:
        """Write a checkpoint, unless there is one of this step.

        Args:
            state: where the program stands.
            step: the outer steps made.
            drawn: the batches drawn by level.

        Raises:
            CheckpointError: it cannot be written; those before it are as they were.
            ProcessError: the processes no longer hold the same numbers.
        """
        if self.folder is None or self.saved == step:
            return
        if self.roles.who()[1] > 1:
            try:
                _alike(state, self.roles)
            except ProcessError:
                self._apart = True
                raise
            state = self.roles.gathered(state)
        if self._rows is not None:
            self._rows.sync()
            checkpoint.save(self.folder, state, step=step, positions=dict(drawn), keep=self.keep)
        self.saved = step

    def rescue(self, state: State, step: int, drawn: Mapping[str, int]) -> str:
        """Write what a run that failed had reached, as far as that can be done without the other processes.

        Args:
            state: the last good state.
            step: the outer steps made.
            drawn: the batches drawn by level.

        Returns:
            Where it is, for a message; empty for nowhere.
        """
        if self.folder is None:
            return ""
        if self._rows is not None and self.saved != step and not self.roles.apart and not self._apart:
            try:
                self._rows.sync()
                checkpoint.save(self.folder, state, step=step, positions=dict(drawn), keep=self.keep)
                self.saved = step
            except (FuncmloError, OSError):  # the error that ended the run is the one to hear of
                pass
        return f", and {self.folder} holds those after {self.saved or 0}"

    def close(self) -> None:
        """Close what is open."""
        if self._rows is not None:
            self._rows.close()


def _agree(folder: Path, steps: int) -> None:
    """Raise unless all processes found the same checkpoint."""
    found: list[int] = told_by_all(steps)
    if len(set(found)) > 1:
        raise ProcessError(
            f"the processes found checkpoints of different steps in {folder}: {found}; it must be one folder that all of "
            "them see."
        )


def _alike(state: State, roles: Roles) -> None:
    """Raise unless all processes hold the same numbers of the levels that they hold alike."""
    sums = {name: _checksum(roles.replicated(name, state)) for name in state.params}
    found: list[dict[str, int]] = told_by_all(sums)
    for name in state.params:
        if len({one[name] for one in found}) > 1:
            raise ProcessError(
                f"level '{name}': the processes no longer hold the same numbers, so nothing was saved. A loss or a source "
                "of batches differs between them in what they should have alike: look for data that are bound to a loss "
                "without being its batch, and for unseeded draws outside of the levels."
            )


def _checksum(tree: Any) -> int:
    """A number that differs with nearly every change of a bit."""
    total = 0
    for i, x in enumerate(_tree.leaves(tree)):
        if isinstance(x, torch.Tensor) and x.numel():
            at = x.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            total += (i + 1) * int((at.to(torch.int64) * (torch.arange(len(at)) % 8191 + 1)).sum())
    return total
