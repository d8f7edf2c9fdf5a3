"""What every loader returns, and the one exception that every loader raises."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class DataError(Exception):
    """A data set is unknown, cannot be found, or came damaged."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set in memory, on the CPU.

    Attributes:
        name: the name that `load` knows it by.
        x: (n, features) float32 in [0, 1], the training examples, flattened.
        y: (n,) int64 in [0, classes), their labels.
        x_test: (n_test, features) float32 in [0, 1].
        y_test: (n_test,) int64 in [0, classes).
        classes: how many classes there are.
        shape: of one example before it was flattened, such as (8, 8) pixels.
        source: a sentence for the tables, on where the numbers come from.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    shape: tuple[int, ...]
    source: str
