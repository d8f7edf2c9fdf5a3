"""The names of checkpoints in their folder."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from funcmlo.errors import CheckpointError
from funcmlo.train import durable

TENSORS, MANIFEST = "state.pt", "manifest.json"
Folder: TypeAlias = str | os.PathLike[str]

_NAME = re.compile(rf"step-(\d{{8,}})|\.step-(\d{{8,}})\.{durable.PREVIOUS}")
_LEFT = re.compile(rf"\.step-\d{{8,}}\..+\.({durable.WRITING}|{durable.REMOVED})")


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08}"


def step_of(path: Folder) -> int | None:
    """Return the step that a checkpoint's name tells; None for any other name."""
    name = _NAME.fullmatch(Path(path).name)
    return None if name is None else int(name[1] or name[2])


def present(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a folder by step.

    One that was being replaced when its process was killed counts, under its hidden name, unless the new one is there.

    Args:
        folder: the folder.

    Returns:
        Steps and paths, the newest last.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    with explained(f"{folder} cannot be read"):
        paths = sorted(folder.iterdir()) if os.path.lexists(folder) else []  # hidden names come first
    return sorted({step: path for path in paths if (step := step_of(path)) is not None}.items())


def leftovers(folder: Path) -> list[Path]:
    """Return what was not yet written or not yet removed when its process was killed."""
    replaced = [p for p in folder.glob(".step-*") if step_of(p) is not None and (folder / name_of(step_of(p) or 0)).exists()]
    return [p for p in folder.glob(".step-*") if _LEFT.fullmatch(p.name)] + replaced


def chosen(path: Path) -> Path:
    """Return the checkpoint that is meant: the path itself, or the newest one in it.

    Args:
        path: a checkpoint, or a folder of them.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if path.is_file() and path.name in (TENSORS, MANIFEST):
        raise CheckpointError(f"load got {path}, a file of a checkpoint; pass its folder, {path.parent}.")
    if step_of(path) is not None or any((path / name).exists() for name in (TENSORS, MANIFEST)):
        return path
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise CheckpointError(f"load got {path}, which is {what}; pass a folder of checkpoints, or one of them.")
    found = present(path)
    if not found:
        raise CheckpointError(f"there is no checkpoint in {path}; save and run(checkpoint=…) write them, as {name_of(10)}.")
    return found[-1][1]


@contextmanager
def explained(what: str) -> Generator[None]:
    """Make errors of the file system, and torch's, the package's own; `what` says what cannot be done."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{what} ({error.strerror or error}): {durable.remedy(error)}.") from error
    except (RuntimeError, ValueError, pickle.PicklingError) as error:
        raise CheckpointError(f"{what} ({first_line(error)}).") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error, or its class."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
