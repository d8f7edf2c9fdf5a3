"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from funcmlo.errors import listing, suggest
from paper_repro.data.base import DataError, Dataset
from paper_repro.data.digits import load_digits
from paper_repro.data.mnist import ARCHIVES, load_mnist

DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": lambda data_dir: load_digits(),  # embedded in scikit-learn: there is no folder to look in
    **{name: partial(load_mnist, name) for name in ARCHIVES},
}


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Load a data set by its name.

    Args:
        name: 'digits', 'mnist' or 'fashion-mnist'.
        data_dir: a folder with the official files, or with a subfolder of that name; None asks FUNCMLO_DATA.

    Returns:
        The data set, the same at every call and on every machine.

    Raises:
        DataError: there is no such data set; a loader also raises it for files that are missing or damaged.

    Example:
        >>> digits = load("digits")
        >>> digits.x.shape, digits.x_test.shape
        (torch.Size([1297, 64]), torch.Size([500, 64]))
    """
    if name not in DATASETS:
        hint = suggest(name, DATASETS)
        raise DataError(f"'{name}' is no data set{hint} Pass one of: {listing(DATASETS)}.")
    return DATASETS[name](data_dir)
