"""What is written beside a checkpoint's tensors: a JSON file that people can read, which guards them and itself."""

from __future__ import annotations

import hashlib
import json
import operator
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo.errors import CheckpointError
from funcmlo.state import State

FORMAT = 1
TREES = {"params": "parameters", "optimizer": "optimizer state", "buffers": "buffers", "response": "estimator state"}
"""The trees of a state, as messages call them."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
        step: the outer steps made.
        positions: the batches drawn by level.
        extra: what else was to be kept.
        seed: the state's seed.
        steps: the updates made by level.
        sha256: the hash of the file of tensors.
        bytes: its length.
        versions: those of torch and funcmlo that wrote it.
        levels: the dtypes and shapes of each level's tensors, by tree and path.
    """

    step: int
    positions: dict[str, int]
    extra: dict[str, Any]
    seed: int
    steps: dict[str, int]
    sha256: str
    bytes: int
    versions: dict[str, str]
    levels: dict[str, dict[str, dict[str, str]]]

    def text(self) -> str:
        """Return the file's text."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def parse(data: bytes) -> Manifest:
    """Read a manifest.

    Args:
        data: the file's content.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a newer version wrote it.
        DamagedError: it is not as it was written.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedError("it holds no manifest of a checkpoint")
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        by = content.get("versions")
        writer = f", written by funcmlo {by.get('funcmlo')}" if isinstance(by, dict) else ""
        raise CheckpointError(f"it has format {version}{writer}; this version reads format {FORMAT}: update funcmlo.")
    if content.pop("checksum", None) != _checksum(content):
        raise DamagedError("its content does not have its checksum: it was altered or cut short")
    del content["format"]
    try:
        manifest = Manifest(**content)
        operator.index(manifest.step)
    except TypeError as error:
        raise DamagedError(f"it holds no manifest of a checkpoint ({error})") from error
    return manifest


def described(state: State) -> dict[str, dict[str, dict[str, str]]]:
    """Return the dtypes and shapes of a state's tensors, by level, tree and path."""

    def tensors(tree: Any) -> dict[str, str]:
        leaves = [(path, x) for path, x in _tree.named_leaves(tree) if isinstance(x, Tensor)]
        return {path: f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for path, x in leaves}

    return {
        level: {name: tensors(getattr(state, field).get(level)) for field, name in TREES.items()} for level in state.params
    }


def versions() -> dict[str, str]:
    """Return the versions that write."""
    return {"torch": str(torch.__version__), "funcmlo": str(getattr(sys.modules.get("funcmlo"), "__version__", "unknown"))}


def counted(what: str, number: Any, least: int = 0) -> int:
    """Return a number as an integer.

    Args:
        what: what it is, for the message.
        number: what came.
        least: the least that it may be.

    Returns:
        The integer.

    Raises:
        CheckpointError: it is none, or less.
    """
    try:
        found = -1 if isinstance(number, bool) else operator.index(number)
    except TypeError:
        found = -1
    if found < least:
        raise CheckpointError(f"{what}={number!r} came; expected an integer from {least} on.")
    return found


def plain(value: Any, where: str) -> Any:
    """Return a value that JSON gives back as it is.

    Args:
        value: None, booleans, numbers, strings, lists, and dicts whose keys are strings.
        where: what it is, for messages.

    Returns:
        The value.

    Raises:
        CheckpointError: it is, or holds, something else.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: plain(x, f"{where}[{key!r}]") for key, x in value.items()}
    keys = " with keys that are no strings" if isinstance(value, Mapping) else ""
    raise CheckpointError(
        f"{where} is {type(value).__name__}{keys}; expected "
        "None, booleans, plain numbers, strings, lists, or dicts with strings as keys."
    )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
