"""A sweep's cells on disk: each finished one is a file, written whole or not at all, and found again by its key."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcmlo.errors import DefinitionError


class DamagedError(Exception):
    """A cell's file is not what was written."""


@dataclass(frozen=True)
class Cells:
    """The folder of a sweep's finished cells.

    A file is a line of JSON, the key and the SHA-256 of the rest, and then the result by `torch.save`. It is read with
    `weights_only=True`, so that a file from elsewhere runs no code.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    def path(self, key: str) -> Path:
        """Return where the cell of this key is, or would be."""
        words = "-".join(str(value) for value in json.loads(key)["cell"].values() if isinstance(value, str | int | float))
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:60]}-{digest(key)[:16]}.cell"

    def read(self, key: str) -> Any:
        """Return what a cell came to.

        Args:
            key: the cell's.

        Returns:
            The result as it was written.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: the file is cut short or altered.
        """
        content = self.path(key).read_bytes()
        head, _, body = content.partition(b"\n")
        if head != _head(key, body):
            raise DamagedError(f"{self.path(key)} is cut short or altered")
        return torch.load(io.BytesIO(body), weights_only=True)

    def write(self, key: str, result: Any) -> None:
        """Write what a cell came to: a temporary file first, which takes the name once the disk has it."""
        buffer, path = io.BytesIO(), self.path(key)
        torch.save(result, buffer)
        temporary = path.with_suffix(".tmp")  # what a kill leaves here, the next try writes over
        try:
            with temporary.open("wb") as file:
                file.write(_head(key, buffer.getvalue()) + b"\n" + buffer.getvalue())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)  # the new name is the folder's content
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _head(key: str, body: bytes) -> bytes:
    return json.dumps({"key": json.loads(key), "sha256": hashlib.sha256(body).hexdigest()}).encode()


def digest(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def written(value: Any) -> str:
    """Write a value as one line of JSON, the same on every machine.

    Args:
        value: numbers, texts, None, paths, dtypes, frozen dataclasses, and lists and mappings of these.

    Returns:
        The line; equal values have equal lines.

    Raises:
        DefinitionError: something else came, whose identity ends with the process.
    """
    return json.dumps(value, default=_named, sort_keys=True)


def _named(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"kind": kind, **{field.name: getattr(value, field.name) for field in fields(value)}}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise DefinitionError(
        f"A cell has {value!r}, of type {type(value).__name__}; expected numbers, texts, None, and dataclasses, lists and "
        "mappings of these, by which the cell is found again. Give a name, and look it up in the function."
    )


def plain(result: Any) -> Any:
    """Return a result as plain data, the same whether it comes from this process, another one or a file.

    Args:
        result: numbers, texts, None, tensors, and lists, tuples and dicts of these.

    Returns:
        The same, with tensors detached and on the CPU.

    Raises:
        TypeError: there is something else in it.
    """
    if result is None or isinstance(result, bool):
        return result
    for kind in (int, float, str):
        if isinstance(result, kind):
            return kind(result)
    if isinstance(result, Tensor):
        return result.detach().cpu().clone()
    if type(result) in {list, tuple}:
        return type(result)(plain(value) for value in result)
    if isinstance(result, Mapping):
        return {plain(name): plain(value) for name, value in result.items()}
    raise TypeError(
        f"a cell returned a {type(result).__name__}; expected numbers, texts, None, tensors, and lists, tuples and dicts of "
        "these (dataclasses.asdict, .item() and torch.from_numpy help)"
    )
