"""What is learned: for each method its first hyperparameters, and the lower optimizer that they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

import funcmlo as fm
from paper_repro.learning_rates.problem import Params, Problem, Settings

Rates = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """One way to parametrize the lower optimizer, gradient descent with momentum.

    Attributes:
        meaning: a sentence for the table.
        start: the hyperparameters that a run begins with.
        optimizer: the optimizer that they make; what the rates say is multiplied by a factor that falls linearly to zero.
    """

    meaning: str
    start: Callable[[Problem, Settings], Rates]
    optimizer: Callable[[Rates, Settings], GradientTransformation]


def one_rate(rates: Rates, settings: Settings) -> GradientTransformation:
    """α_t = (1 − t/T) exp(log_rate)."""
    return torchopt.sgd(lambda t: rates["log_rate"].exp() * _left(t, settings), momentum=settings.momentum)


def rate_and_momentum(rates: Rates, settings: Settings) -> GradientTransformation:
    """The same, with momentum μ = σ(logit)."""
    return torchopt.sgd(lambda t: rates["log_rate"].exp() * _left(t, settings), momentum=rates["logit"].sigmoid())


def per_step(rates: Rates, settings: Settings) -> GradientTransformation:
    """α_t = (1 − t/T) exp(log_rates_t)."""
    return torchopt.sgd(lambda t: rates["log_rates"][t].exp() * _left(t, settings), momentum=settings.momentum)


def per_layer(rates: Rates, settings: Settings) -> GradientTransformation:
    """One rate for each layer, which all of its parameters share."""
    return _by_parameter({f"{layer}.{part}": rates[layer] for layer in rates for part in ("weight", "bias")}, settings)


def per_parameter(rates: Rates, settings: Settings) -> GradientTransformation:
    """One rate for every single number of the classifier: Meta-SGD's α, with the start kept fixed."""
    return _by_parameter(rates, settings)


def _by_parameter(log_rates: Rates, settings: Settings) -> GradientTransformation:
    def rates(t: Tensor) -> Rates:
        return {name: rate.exp() * _left(t, settings) for name, rate in log_rates.items()}

    return fm.optim.sgd(rates, momentum=settings.momentum)


def _left(t: Tensor, settings: Settings) -> Tensor:
    """The share of the training that is left."""
    return 1 - t.double() / settings.inner


def _log(value: float) -> Tensor:
    return torch.tensor(math.log(value), dtype=torch.float64)


def _logit(value: float) -> Tensor:
    return _log(value / (1 - value))


METHODS: dict[str, Method] = {
    "one-rate": Method("one rate", lambda p, s: {"log_rate": _log(s.lowest)}, one_rate),
    "rate-and-momentum": Method(
        "one rate, begun in the middle of the grid, and the momentum",
        lambda p, s: {"log_rate": _log((s.lowest * s.highest) ** 0.5), "logit": _logit(s.momentum)},
        rate_and_momentum,
    ),
    "per-layer": Method(
        "one rate for each of the two layers", lambda p, s: dict.fromkeys(("hidden", "output"), _log(s.lowest)), per_layer
    ),
    "per-step": Method("one rate for each step", lambda p, s: {"log_rates": _log(s.lowest).expand(s.inner)}, per_step),
    "per-parameter": Method(
        "one rate for each number of the classifier, as in Meta-SGD",
        lambda p, s: {name: _log(s.lowest).expand(w.shape) for name, w in p.start.items()},
        per_parameter,
    ),
    "momentum-from-below": Method(
        "one rate, begun like the others at the lowest rate of the grid, and the momentum",
        lambda p, s: {"log_rate": _log(s.lowest), "logit": _logit(s.momentum)},
        rate_and_momentum,
    ),
    "from-above": Method(
        "one rate, begun at the highest rate of the grid, where training diverges",
        lambda p, s: {"log_rate": _log(s.highest)},
        one_rate,
    ),
}


def program(problem: Problem, settings: Settings, method: str) -> fm.Multilevel:
    """Return the bilevel program: a training from a fixed start below, its hyperparameters above.

    Args:
        problem: the data and the start.
        settings: sizes and rates.
        method: a name in METHODS.

    Returns:
        The program, of levels `classifier` and `rates`.
    """
    make = METHODS[method].optimizer
    falling = torchopt.schedule.linear_schedule(settings.upper_rate, settings.upper_rate / 20, settings.outer, 0)
    return fm.Multilevel(
        fm.Level(
            "classifier",
            problem.train_loss,
            lambda rates: make(rates, settings),
            steps=settings.inner,
            init=lambda: problem.start,
            response=fm.ITD(),
        ),
        # Sluggish averages would carry the rates past the minimum, where the validation loss is steep.
        fm.Level("rates", _upper(problem), torchopt.adam(falling, betas=(0.5, 0.5))),
    )


def _upper(problem: Problem) -> Callable[[Rates, Params], Tensor]:
    def valid_loss(rates: Rates, classifier: Params) -> Tensor:
        del rates  # they enter through the training alone
        return problem.valid_loss(classifier)

    return valid_loss
