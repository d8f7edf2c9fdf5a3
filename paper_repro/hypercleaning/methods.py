"""The best responses that are compared, and the program that each of them makes."""

from __future__ import annotations

from collections.abc import Callable

import torchopt

import funcmlo as fm
from paper_repro.hypercleaning.problem import Cleaning, Settings

METHODS: dict[str, Callable[[Settings], fm.BestResponse]] = {
    "itd": lambda s: fm.ITD(),
    "cg": lambda s: fm.AID(fm.CG(s.terms)),
    # A rate at which gradient descent converges is a scale at which the series does.
    "neumann": lambda s: fm.AID(fm.Neumann(s.terms, scale=s.lower_lr)),
    "finite-difference": lambda s: fm.FiniteDifference(),
}


def program(problem: Cleaning, settings: Settings, response: fm.BestResponse) -> fm.Multilevel:
    """Return the bilevel program: a classifier below, one weight per training example above."""
    return fm.Multilevel(
        fm.Level(
            "classifier",
            problem.lower,
            torchopt.sgd(settings.lower_lr, momentum=0.9),
            steps=settings.inner,
            response=response,
        ),
        fm.Level("weights", problem.upper, torchopt.adam(settings.upper_lr)),
    )
