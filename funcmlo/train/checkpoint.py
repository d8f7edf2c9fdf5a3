"""Checkpoints: the whole state of a program in a folder, written so that no kill and no full disk can break one.

    folder/step-00000010/state.pt         the tensors, in plain containers: torch.load(path, weights_only=True) opens it
    folder/step-00000010/manifest.json    step, positions, versions, shapes; guards state.pt and itself by SHA-256

Each is written under a hidden name, synced to the disk, and then renamed in one go; nothing that is loaded is ever run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from funcmlo.errors import CheckpointError
from funcmlo.state import State
from funcmlo.train import durable
from funcmlo.train.fitting import fitted, taken_apart
from funcmlo.train.manifest import DamagedError, Manifest, counted, described, plain, versions
from funcmlo.train.places import MANIFEST, TENSORS, Folder, chosen, explained, leftovers, name_of, present
from funcmlo.train.reading import read, way_out


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        state: the program's state.
        step: the outer steps made.
        positions: the batches drawn by level.
        extra: what else was kept: plain numbers, strings, lists and dicts.
        path: where it is.
    """

    state: State
    step: int
    positions: dict[str, int]
    extra: dict[str, Any]
    path: Path


def save(
    folder: Folder,
    state: State,
    *,
    step: int,
    positions: Mapping[str, int] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 3,
) -> Path:
    """Write a checkpoint; one of the same step is replaced.

    Args:
        folder: the folder of checkpoints, which is made if there is none.
        state: the program's state.
        step: the outer steps made.
        positions: the batches drawn by level.
        extra: what else to keep: None, booleans, plain numbers, strings, lists, and dicts whose keys are strings.
        keep: how many checkpoints stay, this one and those of steps before it; None for all.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: it cannot be written, or the state holds what a file cannot keep; the checkpoints before it are as
            they were.

    Example:
        >>> import tempfile, torch, torchopt, funcmlo as fm
        >>> from funcmlo.train.checkpoint import load, save
        >>> program = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), torchopt.adam(0.1)))
        >>> state, _ = program.step(program.init({"y": torch.ones(2)}), {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save(folder, state, step=1)
        ...     found = load(folder, program.init({"y": torch.zeros(2)}))
        >>> path.name, found.step, found.state.params["y"]
        ('step-00000001', 1, tensor([0.9000, 0.9000]))
    """
    if not isinstance(state, State):
        raise CheckpointError(f"save got {type(state).__name__}; expected the state that program.step returns.")
    step = counted("save: step", step)
    keep = None if keep is None else counted("save: keep", keep, 1)
    drawn = {str(level): counted(f"save: positions[{level!r}]", n) for level, n in (positions or {}).items()}
    more, content = plain({} if extra is None else extra, "save: extra"), taken_apart(state)
    path = Path(folder) / name_of(step)
    new = durable.hidden(path, durable.WRITING)
    with explained(f"checkpoint {path} cannot be written; those before it are as they were"):
        durable.make_folder(path.parent)
        new.mkdir()
        try:
            tensors = durable.write(new / TENSORS, lambda file: torch.save(content, file))  # type: ignore[arg-type]
            told = Manifest(
                step, drawn, more, state.seed, dict(state.step), tensors.sha256, tensors.length, versions(), described(state)
            )
            durable.write(new / MANIFEST, lambda file: file.write(told.text().encode()))
            durable.sync_folder(new)
            durable.put(new, path)
        except BaseException:
            durable.delete(new)
            raise
    if keep is not None:
        with explained(f"checkpoint {path} is written, but an earlier one cannot be removed"):
            for old in [p for n, p in present(path.parent) if n < step][: -(keep - 1) or None]:
                durable.remove(old)
    return path


def load(path: Folder, like: State, *, seed_matters: bool = True) -> Checkpoint:
    """Read a checkpoint, whole and as it was written, or raise; no code in it is run.

    Args:
        path: the folder of checkpoints, of which the newest is taken, or one checkpoint.
        like: a state of the program, such as `program.init` returns: the checkpoint must fit it, and tensors come to the
            devices of its tensors. An estimator's state that is None there fits any, so one that changes its structure
            begins with None.
        seed_matters: whether a state of another seed is an error.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it does not fit; says what differs and what to do.
    """
    if not isinstance(like, State):
        raise CheckpointError(f"load got like={type(like).__name__}; expected a state, such as program.init returns.")
    found = chosen(Path(path))
    try:
        manifest, content = read(found)
        state = fitted(content, like, seed_matters=seed_matters)
    except DamagedError as error:
        raise CheckpointError(f"checkpoint {found} is damaged: {error}. {way_out(found)}") from error.__cause__ or error
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {found} cannot be taken: {error}") from error.__cause__ or error
    return Checkpoint(state, manifest.step, manifest.positions, manifest.extra, found)


def newest(folder: Folder) -> Path | None:
    """Return the newest checkpoint of a folder, or None where there is none; those half written do not count.

    Args:
        folder: the folder of checkpoints.

    Returns:
        The checkpoint's path, which `load` takes.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    found = present(Path(folder))
    return found[-1][1] if found else None


def clear(folder: Folder) -> None:
    """Remove what was left by processes that were killed while they wrote; no other may be writing there.

    Args:
        folder: the folder of checkpoints.

    Raises:
        CheckpointError: the folder cannot be read or written.
    """
    folder = Path(folder)
    with explained(f"{folder} cannot be cleared of what was left half written"):
        for step, path in present(folder):
            if path.name != name_of(step):
                durable.restore(folder / name_of(step))
        for path in leftovers(folder):
            durable.delete(path)
