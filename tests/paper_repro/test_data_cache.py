"""The cache: all four files or none, and where it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from paper_repro.data import DataError
from paper_repro.data.fetch import cache_folder, install
from paper_repro.data.idx import FILES

LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 1, 6])
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 99])
CONTENT = {name: IMAGES if "images" in name else LABELS for name in FILES}
DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}


def good(into):
    for name, content in CONTENT.items():
        (into / name).write_bytes(content)


def test_the_cache_appears_whole_or_not_at_all(tmp_path):
    cache = tmp_path / "deep" / "cache"
    seen = []

    def fetcher(into):
        good(into)
        seen.append((into, cache.exists()))

    assert install(fetcher, cache, DIGESTS).images.tolist() == [[[99]]]
    [(into, existed)] = seen
    assert not existed
    assert into.parent.parent == cache.parent  # on one file system, so that the rename is atomic
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == CONTENT
    assert list(cache.parent.iterdir()) == [cache]


def broken(into):
    good(into)
    (into / FILES[3]).write_bytes(LABELS[:-1] + b"\x05")


def cut_short(into):
    good(into)
    (into / FILES[0]).unlink()


def stopped(into):
    good(into)
    raise DataError("stopped on the way")


@pytest.mark.parametrize(
    ("fetcher", "problem"),
    [(broken, rf"{FILES[3]} has the SHA-256"), (cut_short, f"lacks {FILES[0]}"), (stopped, "stopped on the way")],
)
def test_what_is_not_whole_leaves_nothing_behind(fetcher, problem, tmp_path):
    with pytest.raises(DataError, match=problem):
        install(fetcher, tmp_path / "cache", DIGESTS)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_fill_the_cache_first(tmp_path):
    cache = tmp_path / "cache"

    def fetcher(into):
        good(into)
        cache.mkdir()
        good(cache)

    assert install(fetcher, cache, DIGESTS).labels.tolist() == [6]
    assert list(tmp_path.iterdir()) == [cache]


def test_a_cache_that_is_in_use_for_something_else_is_named(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=rf"the cache {cache} cannot be written \(.*\): clear it, or set XDG_CACHE_HOME"):
        install(good, cache, DIGESTS)
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]


def test_a_cache_under_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"the cache .*file/cache cannot be written"):
        install(good, tmp_path / "file" / "cache", DIGESTS)


@pytest.mark.parametrize(
    ("stated", "expected"), [("/elsewhere", "/elsewhere"), ("", "/home/me/.cache"), ("relative", "/home/me/.cache")]
)
def test_the_cache_follows_the_xdg_rules(stated, expected, monkeypatch):
    """A relative XDG_CACHE_HOME is invalid by its specification, and ignored."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", stated)
    assert cache_folder("mnist") == Path(expected, "funcmlo", "mnist")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("mnist") == Path("/home/me/.cache/funcmlo/mnist")
