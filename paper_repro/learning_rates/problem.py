"""The problem: a small network on real data, trained for a fixed number of steps from a fixed start."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data import Dataset

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """The sizes and rates of a run.

    Attributes:
        train: training examples.
        valid: validation examples.
        hidden: hidden units.
        inner: T, the steps of a training.
        outer: updates of the learned hyperparameters.
        momentum: of the training, where it is not learned.
        lowest: the lowest rate of the grid, at which a learned run starts too.
        highest: the highest rate of the grid.
        grid: the number of rates in the grid, evenly spaced in the logarithm.
        fine: the same for the fine grid, which the figure draws.
        upper_rate: Adam's rate for the hyperparameters at the first update; it falls linearly to a twentieth of that.
        threads: how many threads torch uses, None for its own choice.
    """

    train: int = 500
    valid: int = 797
    hidden: int = 32
    inner: int = 60
    outer: int = 25
    momentum: float = 0.9
    lowest: float = 1e-3
    highest: float = 10.0
    grid: int = 10
    fine: int = 55
    upper_rate: float = 0.7
    threads: int | None = 1


@dataclass(frozen=True)
class Score:
    """What a trained classifier is worth.

    Attributes:
        valid: mean cross-entropy on the validation examples, in nats.
        test: the same on the test examples.
        accuracy: the share of test examples that are classified right.
    """

    valid: float
    test: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Problem:
    """One draw of the problem, in float64.

    Attributes:
        x: training inputs, (n, d).
        y: training labels, (n,) int64.
        x_valid: validation inputs, (m, d).
        y_valid: validation labels, (m,) int64.
        x_test: test inputs, (k, d).
        y_test: test labels, (k,) int64.
        start: the classifier that every training begins with.
    """

    x: Tensor
    y: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor
    start: Params

    def train_loss(self, classifier: Params) -> Tensor:
        """g(y), the mean cross-entropy on all training examples."""
        return F.cross_entropy(logits(classifier, self.x), self.y)

    def valid_loss(self, classifier: Params) -> Tensor:
        """f(y), the mean cross-entropy on the validation examples."""
        return F.cross_entropy(logits(classifier, self.x_valid), self.y_valid)

    def score(self, classifier: Params) -> Score:
        """Measure a trained classifier."""
        with torch.no_grad():
            outputs = logits(classifier, self.x_test)
            return Score(
                float(self.valid_loss(classifier)),
                float(F.cross_entropy(outputs, self.y_test)),
                float((outputs.argmax(dim=1) == self.y_test).double().mean()),
            )


def draw(data: Dataset, settings: Settings, seed: int) -> Problem:
    """Split a data set and draw the start.

    Args:
        data: the data set.
        settings: the sizes.
        seed: decides the split and the start.

    Returns:
        The problem.

    Raises:
        ValueError: the data set is smaller than the settings ask for.
    """
    if settings.train + settings.valid > len(data.x):
        raise ValueError(
            f"{data.name} has {len(data.x):,} training examples; {settings.train:,} + {settings.valid:,} were asked for."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.x), generator=generator)
    train, valid = order[: settings.train], order[settings.train : settings.train + settings.valid]
    features, hidden, classes = data.x.shape[1], settings.hidden, data.classes

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(rows)

    start = {
        "hidden.weight": weight(features, hidden),
        "hidden.bias": torch.zeros(hidden, dtype=torch.float64),
        "output.weight": weight(hidden, classes),
        "output.bias": torch.zeros(classes, dtype=torch.float64),
    }
    x, x_test = data.x.double(), data.x_test.double()
    return Problem(x[train], data.y[train], x[valid], data.y[valid], x_test, data.y_test, start)


def logits(classifier: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return the scores of a network with one hidden layer of tanh units, (n, classes)."""
    hidden = torch.tanh(x @ classifier["hidden.weight"] + classifier["hidden.bias"])
    scores: Tensor = hidden @ classifier["output.weight"] + classifier["output.bias"]
    return scores
