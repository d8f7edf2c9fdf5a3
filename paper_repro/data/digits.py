"""Digits: the 1,797 real 8×8 handwritten digits that scikit-learn carries, so the default needs no download."""

from __future__ import annotations

import torch

from paper_repro.data.base import DataError, Dataset

TEST = 500
SEED = 0  # part of the data set's definition: another seed is another split, and other numbers in every table
INK = 16  # a pixel counts the inked ones of a 4×4 block, 0 to 16


def load_digits() -> Dataset:
    """Load the digits with a fixed split, 1,297 to train on and 500 to test on.

    Returns:
        The data set: x is (1297, 64) in sixteenths, the test set (500, 64).

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as embedded
    except ImportError as error:
        raise DataError(
            f"'digits' is embedded in scikit-learn, which cannot be imported ({error}): pip install 'funcmlo[paper]'."
        ) from error
    pixels, labels = embedded(return_X_y=True)
    x = torch.from_numpy(pixels).to(torch.float32) / INK
    y = torch.from_numpy(labels).to(torch.int64)
    order = torch.randperm(len(y), generator=torch.Generator("cpu").manual_seed(SEED), device="cpu")
    test, train = order[:TEST], order[TEST:]
    return Dataset(
        name="digits",
        x=x[train],
        y=y[train],
        x_test=x[test],
        y_test=y[test],
        classes=10,
        shape=(8, 8),
        source=f"scikit-learn load_digits, {len(y):,} real 8×8 handwritten digits, split at random with seed {SEED}",
    )
