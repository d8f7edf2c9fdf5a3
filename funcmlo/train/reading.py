"""Reading a checkpoint: nothing is taken from a file that is not as it was written, and nothing in it is run."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from funcmlo.errors import CheckpointError
from funcmlo.train import durable
from funcmlo.train.encoding import Plain
from funcmlo.train.manifest import DamagedError, Manifest, parse
from funcmlo.train.places import MANIFEST, TENSORS, first_line, present, step_of


def read(path: Path) -> tuple[Manifest, Plain]:
    """Return a checkpoint's content, after its files were held against their hashes.

    Args:
        path: the checkpoint.

    Returns:
        The manifest, and the state in plain containers.

    Raises:
        CheckpointError: it cannot be read here.
        DamagedError: it is not as it was written.
    """
    manifest = _manifest(path)
    with _opened(path / TENSORS) as file:
        _check(file, manifest)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is odd about a file ends in an error
                return manifest, torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise DamagedError(
                f"{TENSORS} holds more than tensors in plain containers, and nothing of it was run ({first_line(error)})"
            ) from error
        except Exception as error:  # of many kinds, out of memory among them
            raise CheckpointError(
                f"{TENSORS} is as it was written, but torch cannot read it ({first_line(error)})."
            ) from error


def way_out(damaged: Path) -> str:
    """Say what to do about a damaged checkpoint: which one before it is good."""
    own = step_of(damaged)
    for step, path in reversed(present(damaged.parent) if own is not None else []):
        if own is None or step >= own:
            continue
        try:
            manifest = _manifest(path)
            with _opened(path / TENSORS) as file:
                _check(file, manifest)
        except CheckpointError:
            continue
        return f"The one before it, {path}, is good: remove {damaged} to go on from step {step}."
    return f"No good one is before it: remove {damaged} to begin anew, or put a copy of it in its place."


def _manifest(path: Path) -> Manifest:
    with _opened(path / MANIFEST) as file:
        try:
            manifest = parse(file.read())
        except CheckpointError as error:
            raise type(error)(f"{MANIFEST}: {error}") from error.__cause__
    if step_of(path) not in (None, manifest.step):
        raise DamagedError(f"{MANIFEST} is that of step {manifest.step}: the folder was renamed")
    return manifest


def _check(file: Any, manifest: Manifest) -> None:
    """Raise unless the tensors' file is the one that was written."""
    length = os.fstat(file.fileno()).st_size
    if length != manifest.bytes:
        raise DamagedError(f"{TENSORS} has {length:,} bytes instead of {manifest.bytes:,}: it was cut short or altered")
    if durable.sha256(file) != manifest.sha256:
        raise DamagedError(f"{TENSORS} does not have its SHA-256: it was altered")


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """A file of a checkpoint, opened and read, or damage."""
    try:
        with open(path, "rb") as file:
            yield file
    except PermissionError as error:
        raise CheckpointError(f"{path.name} may not be read ({error.strerror}): change its permissions.") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read ({error.strerror})") from error
