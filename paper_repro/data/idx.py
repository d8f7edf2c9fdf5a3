"""IDX, the file format of MNIST and its relatives: two zero bytes, a type code, the rank, big-endian sizes, the data."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from funcmlo.errors import listing
from paper_repro.data.base import DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

UNSIGNED_BYTE = 0x08
TYPES = {0x08: "unsigned byte", 0x09: "signed byte", 0x0B: "short", 0x0C: "int", 0x0D: "float", 0x0E: "double"}
GZIP = b"\x1f\x8b"
AGAIN = "fetch the official file again"


class Images(NamedTuple):
    """The four arrays of an MNIST-like data set, as stored: images (n, rows, columns) and labels (n,), both uint8."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """Read one IDX file of unsigned bytes, gzipped or not, whatever its name says.

    Args:
        path: the file.
        sha256: the digest in hex that the decompressed content must have; None accepts any content.

    Returns:
        The array, uint8, of the shape that the file states.

    Raises:
        DataError: the file cannot be read, has another digest, or is no whole IDX file of unsigned bytes.
    """
    content = _content(path)
    if sha256 is not None and (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(
            f"{path} has the SHA-256 {digest} (decompressed), expected {sha256}: it is damaged or belongs to another data "
            f"set. {AGAIN.capitalize()}, and keep each data set in a subfolder of its own name."
        )
    if len(content) < 4:
        raise DataError(f"{path} is truncated: {len(content)} bytes came, expected a magic number of 4; {AGAIN}.")
    zeros, code, rank = content[:2], content[2], content[3]
    if zeros != b"\0\0" or code not in TYPES or rank == 0:
        raise DataError(
            f"{path} is no IDX file: its magic number is 0x{content[:4].hex()}, expected 0x00000801 for labels or "
            f"0x00000803 for images; {AGAIN}."
        )
    if code != UNSIGNED_BYTE:
        raise DataError(f"{path} stores the type 0x{code:02x} ({TYPES[code]}), expected 0x08 (unsigned byte); {AGAIN}.")
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{path} is truncated: {len(content)} bytes came, expected a header of {start}; {AGAIN}.")
    shape = struct.unpack(f">{rank}I", content[4:start])
    came, expected = len(content) - start, math.prod(shape)
    if came != expected:
        problem = "is truncated" if came < expected else "has trailing bytes"
        raise DataError(f"{path} {problem}: {came} bytes of data came, expected {expected} for the shape {shape}; {AGAIN}.")
    if expected == 0:  # torch.frombuffer refuses an empty buffer
        return torch.empty(shape, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def holds(folder: Path) -> bool:
    """Return whether a folder has any of the four files, raw or gzipped."""
    return any(_find(folder, name) for name in FILES)


def read_folder(folder: Path, sha256: Mapping[str, str], *, verify: bool = True) -> Images:
    """Read the four files of an MNIST-like data set.

    Args:
        folder: where they lie, each as `NAME` or `NAME.gz`; the first is taken where there are both.
        sha256: by file name, the digest of the decompressed content.
        verify: whether to check the digests; False is for tests, which write files of their own.

    Returns:
        The four arrays.

    Raises:
        DataError: a file is missing or damaged, or has another digest, or images and labels do not pair up.
    """
    found = {name: _find(folder, name) for name in FILES}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise DataError(
            f"{folder} lacks {listing(missing)}; expected four files, {listing(FILES)}, raw or .gz: add what is missing or "
            "remove the rest."
        )
    arrays = Images(*(read_idx(path, sha256[name] if verify else None) for name, path in found.items() if path))
    for images, labels, part in ((arrays.images, arrays.labels, "train"), (arrays.test_images, arrays.test_labels, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(
                f"{folder} has {part} images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}, "
                f"expected (n, rows, columns) and (n,); {AGAIN}."
            )
    return arrays


def _find(folder: Path, name: str) -> Path | None:
    # os.path says False where it may not look; Path.is_file raises PermissionError before Python 3.14
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def _content(path: Path) -> bytes:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); expected an IDX file: check the path and its rights.") from error
    if not stored.startswith(GZIP):
        return stored
    try:
        return gzip.decompress(stored)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is a corrupt gzip file ({error}), expected a whole one; {AGAIN}.") from error
