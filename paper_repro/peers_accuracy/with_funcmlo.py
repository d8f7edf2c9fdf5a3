"""This library: a program whose upper level is moved along the course instead of by its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

import funcmlo as fm
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings
from paper_repro.peers_accuracy.quasi_newton import Shared, quasi_newton

MOST = 500
"""The most products of a solve that stops by its tolerance."""


def momentum(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the peers' inner loop with a solve that goes on from the last one's, and stops by a tolerance."""
    response = fm.AID(fm.CG(MOST, tol=knobs.linear), warm_start=True)
    return _along(problem, settings, knobs, _descent(settings), response)


def compiled(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the same, compiled before it is asked anything, as JAX is."""
    response = fm.AID(fm.CG(MOST, tol=knobs.linear), warm_start=True)
    return _along(problem, settings, knobs, _descent(settings), response, fast=True)


def cold(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the peers' own method: the same inner loop, and as many products from zero at every outer step."""
    return _along(problem, settings, knobs, _descent(settings), fm.AID(fm.CG(int(knobs.linear))))


def shared(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the method whose inner optimizer's memory lasts, and preconditions the solve."""
    optimizer = quasi_newton(settings.memory, knobs.steps, rate=1.0)
    response = fm.AID(fm.CG(MOST, tol=knobs.linear, preconditioner=Shared(rate=1.0)), warm_start=True)
    return _along(problem, settings, knobs, optimizer, response)


def _descent(settings: Settings) -> GradientTransformation:
    return torchopt.sgd(settings.lower_lr, momentum=settings.momentum)


def _along(
    problem: Cleaning,
    settings: Settings,
    knobs: Knobs,
    optimizer: GradientTransformation,
    response: fm.BestResponse,
    *,
    fast: bool = False,
) -> Answer:
    program = fm.Multilevel(
        fm.Level(
            "classifier",
            problem.lower,
            optimizer,
            steps=knobs.steps,
            response=response,
            warmup=(settings.begin - 1) * knobs.steps,
        ),
        fm.Level("weights", problem.upper, _recorder()),
    )
    if fast:
        program = program.compile()
        program.step(program.init({"classifier": problem.classifier(), "weights": torch.zeros(len(problem.x))}), {})
    state: fm.State | None = None

    def answer(x: Tensor, steps: int) -> Tensor:
        nonlocal state
        del steps  # the level's own, with its warm-up
        before = state or program.init({"classifier": problem.classifier(), "weights": x})
        state, _ = program.step(replace(before, params={**before.params, "weights": x}), {})
        gradient: Tensor = state.optimizer["weights"]
        return gradient

    return answer


def _recorder() -> GradientTransformation:
    """Return an optimizer that moves nothing, and whose state is the last gradient."""

    def update(updates: Any, state: Any) -> tuple[Any, Any]:
        del state
        return 0 * updates, updates

    return GradientTransformation(lambda params: 0 * params, update)


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {
    "funcmlo-cold": cold,
    "funcmlo-momentum": momentum,
    "funcmlo-compiled": compiled,
    "funcmlo": shared,
}
