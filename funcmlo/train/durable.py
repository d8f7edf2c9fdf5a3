"""Files that survive a kill and a power failure: synced before they get their name, and renamed in one go.

A folder is written under a hidden name, and what is removed is given one first, so that nothing is ever half there under
a good name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

WRITING, REMOVED, PREVIOUS = "writing", "removed", "previous"


@dataclass
class Hashed:
    """A file that is written from its beginning to its end, and hashed on the way.

    Attributes:
        file: the file.
        length: the bytes written.
        failure: what stopped it, since who writes may raise something else because of it.
    """

    file: BinaryIO
    length: int = 0
    failure: BaseException | None = None
    _hash: Any = field(default_factory=hashlib.sha256)

    def write(self, data: Any) -> int:
        """Write some bytes and return how many they are."""
        try:
            self.file.write(data)
        except BaseException as error:
            self.failure = self.failure or error
            raise
        self._hash.update(data)
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        """Hand what was written to the system."""
        self.file.flush()

    @property
    def sha256(self) -> str:
        """The hash of what was written."""
        return str(self._hash.hexdigest())


def write(path: Path, content: Callable[[Hashed], object]) -> Hashed:
    """Write a new file and wait until it is on the disk.

    Args:
        path: where; there is nothing yet.
        content: what writes into it.

    Returns:
        Its length and hash.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "xb") as file:
        hashed = Hashed(file)
        try:
            content(hashed)
        except Exception as error:
            raise (hashed.failure or error) from None
        file.flush()
        os.fsync(file.fileno())
    return hashed


def sha256(file: BinaryIO) -> str:
    """Return the hash of an open file's content, from where it stands."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        found.update(buffer[:count])
    return found.hexdigest()


def make_folder(path: Path) -> None:
    """Make a folder and those it is in, unless they are there, and wait until they are on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # which has no such thing
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hidden(path: Path, kind: str) -> Path:
    """Return a hidden name beside a path: its own for what is being written or removed, one for what is replaced."""
    token = "" if kind == PREVIOUS else f".{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name.lstrip('.')}{token}.{kind}")


def put(new: Path, path: Path) -> None:
    """Give a complete folder its name; one that has it already is replaced.

    Between two renames the old one has the name `hidden(path, PREVIOUS)`, where `restore` finds it.

    Args:
        new: the folder under its hidden name.
        path: its name.

    Raises:
        OSError: it cannot get its name; the old one has it still.
    """
    previous = hidden(path, PREVIOUS)
    if os.path.lexists(path):
        if os.path.lexists(previous):
            remove(previous)
        os.rename(path, previous)
    try:
        os.rename(new, path)
    except OSError:
        restore(path)
        raise
    sync_folder(path.parent)
    if os.path.lexists(previous):
        remove(previous)


def restore(path: Path) -> None:
    """Give a folder that was being replaced its name back, if there is no new one."""
    previous = hidden(path, PREVIOUS)
    if os.path.lexists(previous):
        if os.path.lexists(path):
            remove(previous)
        else:
            os.rename(previous, path)


def remove(path: Path) -> None:
    """Remove a folder or a file; what cannot be deleted after it has lost its name stays for the next `clear`."""
    doomed = hidden(path, REMOVED)
    os.rename(path, doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """Delete a folder or a file as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remedy(error: OSError) -> str:
    """Say what to do about an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "make room, or let fewer be kept (keep=)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that may be written to, or change its permissions"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file is where a folder should be: choose another folder, or move the file"
    return "see to the disk, or choose another folder"
