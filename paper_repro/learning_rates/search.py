"""The grid search, by ordinary training: torch.optim.SGD, with nothing of this package in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paper_repro.learning_rates.problem import Params, Problem, Score, Settings


def rates(settings: Settings, count: int) -> list[float]:
    """Return rates from the lowest to the highest, evenly spaced in the logarithm."""
    low, high = math.log10(settings.lowest), math.log10(settings.highest)
    found: list[float] = torch.logspace(low, high, count, dtype=torch.float64).tolist()
    return found


def train(problem: Problem, settings: Settings, rate: float) -> Params:
    """Train by gradient descent with momentum, at a rate that falls linearly to zero.

    Args:
        problem: the data and the start.
        settings: the number of steps, and the momentum.
        rate: the first step's rate.

    Returns:
        The classifier after the last step.
    """
    classifier = {name: p.clone().requires_grad_() for name, p in problem.start.items()}
    optimizer = torch.optim.SGD(classifier.values(), lr=rate, momentum=settings.momentum)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / settings.inner)
    for _ in range(settings.inner):
        optimizer.zero_grad()
        loss: Tensor = problem.train_loss(classifier)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
    return {name: p.detach() for name, p in classifier.items()}


def search(problem: Problem, settings: Settings, count: int) -> list[tuple[float, Score]]:
    """Train at every rate of a grid.

    Args:
        problem: the data and the start.
        settings: the grid's ends, and the training.
        count: how many rates.

    Returns:
        (rate, score) pairs, the lowest rate first.
    """
    return [(rate, problem.score(train(problem, settings, rate))) for rate in rates(settings, count)]


def least(grid: list[tuple[float, Score]]) -> tuple[float, Score]:
    """Return the rate of least validation loss, with its score."""
    return min(grid, key=lambda pair: pair[1].valid)
