"""The hyper-cleaning problem: data with wrong labels, its two costs, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
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
        train: noisy training examples.
        valid: clean validation examples.
        corrupted: the share of training labels that are replaced by wrong ones.
        outer: upper steps.
        inner: lower steps for each upper step.
        lower_lr: the classifier's learning rate (with momentum 0.9).
        upper_lr: the example weights' learning rate (Adam).
        decay: λ in front of ‖classifier‖².
        terms: products of CG and of the Neumann series.
        evaluate_every: upper steps between two points of the accuracy curves.
        threads: how many threads torch uses, None for its own choice; on small problems one is twice as fast as two.
    """

    train: int
    valid: int
    outer: int
    corrupted: float = 0.5
    inner: int = 20
    lower_lr: float = 0.5
    upper_lr: float = 0.1
    decay: float = 1e-3
    terms: int = 10
    evaluate_every: int = 5
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class Cleaning:
    """One draw of the problem.

    Attributes:
        x: training inputs, (n, d) float32.
        given: training labels as given, (n,) int64, partly wrong.
        true: the labels before corruption, (n,) int64.
        x_valid: clean validation inputs, (m, d) float32.
        y_valid: clean validation labels, (m,) int64.
        x_test: test inputs, (k, d) float32.
        y_test: test labels, (k,) int64.
        classes: the number of classes.
        decay: λ in front of ‖classifier‖².
    """

    x: Tensor
    given: Tensor
    true: Tensor
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    decay: float

    @property
    def clean(self) -> Tensor:
        """Which training labels are right, (n,) bool."""
        return self.given == self.true

    def classifier(self) -> Params:
        """Return the linear classifier's first parameters, all zero."""
        return {"weight": torch.zeros(self.x.shape[1], self.classes), "bias": torch.zeros(self.classes)}

    def lower(self, classifier: Params, weights: Tensor) -> Tensor:
        """g(y, x) = mean_i σ(x_i) CE_i(y) + λ ‖y‖², on the labels as given."""
        losses = F.cross_entropy(logits(classifier, self.x.to(weights.dtype)), self.given, reduction="none")
        return (torch.sigmoid(weights) * losses).mean() + self.decay * _squared(classifier)

    def upper(self, weights: Tensor, classifier: Params) -> Tensor:
        """f(y) = CE on the clean validation set; the weights do not enter directly."""
        del weights
        return F.cross_entropy(logits(classifier, self.x_valid.to(classifier["weight"].dtype)), self.y_valid)

    def accuracy(self, classifier: Params) -> float:
        """Return the share of test examples that are classified right."""
        predicted = logits(classifier, self.x_test.to(classifier["weight"].dtype)).argmax(dim=1)
        return float((predicted == self.y_test).double().mean())


def draw(data: Dataset, settings: Settings, seed: int) -> Cleaning:
    """Split a data set and make labels wrong: each of the corrupted ones becomes another class, uniformly.

    Args:
        data: the data set.
        settings: the sizes.
        seed: decides the split and the corruption.

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
    valid, train = order[: settings.valid], order[settings.valid : settings.valid + settings.train]
    true = data.y[train]
    wrong = torch.randperm(settings.train, generator=generator)[: round(settings.corrupted * settings.train)]
    given = true.clone()
    shift = torch.randint(1, data.classes, (len(wrong),), generator=generator)
    given[wrong] = (true[wrong] + shift) % data.classes
    return Cleaning(
        data.x[train], given, true, data.x[valid], data.y[valid], data.x_test, data.y_test, data.classes, settings.decay
    )


def logits(classifier: Params, x: Tensor) -> Tensor:
    """Return the linear classifier's scores, (n, classes)."""
    return x @ classifier["weight"] + classifier["bias"]


def fit(x: Tensor, y: Tensor, like: Params, decay: float) -> Params:
    """Train the classifier on plain labels to convergence: mean CE + λ ‖y‖², which is strongly convex.

    Args:
        x: inputs, (n, d).
        y: labels, (n,).
        like: where to start.
        decay: λ.

    Returns:
        The minimizer, to float32's rounding.
    """
    return minimize(lambda classifier: F.cross_entropy(logits(classifier, x), y) + decay * _squared(classifier), like)


def minimize(cost: Callable[[Params], Tensor], start: Params) -> Params:
    """Minimize a smooth convex cost of the classifier by L-BFGS, to the dtype's rounding."""
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    solver = torch.optim.LBFGS(
        params.values(),
        max_iter=2000,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        value = cost(params)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    return {name: p.detach() for name, p in params.items()}


def auc(score: Tensor, positive: Tensor) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Args:
        score: (n,).
        positive: (n,) bool.

    Returns:
        A number in [0, 1].
    """
    high, low = score[positive].double(), score[~positive].double().sort().values
    below = torch.searchsorted(low, high, right=False)
    below_or_equal = torch.searchsorted(low, high, right=True)
    return float((below + below_or_equal).double().mean() / (2 * len(low)))


def _squared(classifier: Params) -> Tensor:
    return torch.stack([(p**2).sum() for p in classifier.values()]).sum()
