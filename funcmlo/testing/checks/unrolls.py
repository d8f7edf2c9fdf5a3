"""Does an unrolled derivative run through all that a step reads: its batch, its learning rate, its projection?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torchopt
from torch import Tensor

from funcmlo.errors import EstimatorError
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel
from funcmlo.testing.checks.base import Check, any_level, check, unrolled
from funcmlo.testing.checks.products import judged
from funcmlo.testing.examined import DEVIATIONS, DRAWS, Answer, Examined
from funcmlo.testing.matrices import cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding

_STEPS = 3


@check(any_level, unrolled)
def batch_of_another_step(examined: Examined) -> Finding:
    """Each step is differentiated on its own batch: y ← y − (A_t y − B_t x)."""
    batches = [(symmetric(3, 3.0, examined.seed + t), cross(3, 2, examined.seed + t)) for t in range(_STEPS)]

    def loss(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * y @ batch[0] @ y - y @ (batch[1] @ x)

    def step(y: Tensor, x: Tensor, t: int) -> Tensor:
        return y - (batches[t][0] @ y - batches[t][1] @ x)

    level = {"loss": loss, "optimizer": torchopt.sgd(1.0)}
    found = _compared(examined, level, step, normal(flat(2), examined.seed), {"y": lambda t: batches[t]})
    return judged(found[0], *found[1:], 1.0, "the steps are not differentiated each on its own batch")


@check(any_level, unrolled)
def learning_rate_missing(examined: Examined) -> Finding:
    """A learning rate that is read from the level above has a derivative."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, 1, examined.seed)[:, 0]
    level = {"loss": lambda y, x: 0.5 * y @ a @ y - y @ b, "optimizer": lambda x: torchopt.sgd(x)}
    start = torch.tensor(0.7, dtype=torch.float64)
    try:
        found = _compared(examined, level, lambda y, x, t: y - x * (a @ y - b), start, {})
    except EstimatorError as error:
        return Finding(0.0, 0.0, f"it refuses, which is no wrong answer: {error}")
    return judged(found[0], *found[1:], 1.0, "the derivative does not run through the optimizer's learning rate")


@check(any_level, unrolled)
def projection_missing(examined: Examined) -> Finding:
    """Steps that end in a projection, y ← tanh(y − ∇g), are differentiated with it."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)
    loss: Callable[..., Tensor] = lambda y, x: 0.5 * y @ a @ y - y @ (b @ x)  # ruff: ignore[lambda-assignment]
    level = {"loss": loss, "optimizer": torchopt.sgd(1.0), "project": torch.tanh}
    x = normal(flat(2), examined.seed)
    found = _compared(examined, level, lambda y, x, t: torch.tanh(y - (a @ y - b @ x)), x, {})
    return judged(found[0], *found[1:], 1.0, "the derivative does not run through the projection")


@check(any_level, unrolled, lambda e: None if e.estimator.follows_start else "it does not differentiate by the start")
def start_missing(examined: Examined) -> Finding:
    """Where a loop starts at what a level above says, the start has a derivative."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, 3, examined.seed)
    loss: Callable[..., Tensor] = lambda y, x: 0.5 * y @ a @ y - y @ (b @ x)  # ruff: ignore[lambda-assignment]
    level = {"loss": loss, "optimizer": torchopt.sgd(0.3), "init": lambda x: 2 * x}
    x = normal(flat(3), examined.seed)
    found = _compared(examined, level, lambda y, x, t: y - 0.3 * (a @ y - b @ x), x, {}, lambda x: 2 * x)
    return judged(found[0], *found[1:], 1.0, "the derivative does not run through the loop's start")


def _compared(
    examined: Examined,
    level: dict[str, Any],
    step: Callable[[Tensor, Tensor, int], Tensor],
    x: Tensor,
    batches: Any,
    start: Any = None,
) -> tuple[Examined, Answer, Tensor]:
    """The turned estimator, its hypergradient of Σ sin y_T, the mean for one that draws, and that of the steps by hand."""
    examined = examined.converged
    begin = normal(flat(3), examined.seed + 5)
    program = Multilevel(
        Level("y", level.pop("loss"), level.pop("optimizer"), steps=_STEPS, response=examined.estimator, **level),
        Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": begin, "x": x})

    def once(seed: int) -> Tensor:
        return ravel(examined.hypergradient(program, replace(state, seed=seed), batches, of="x"))

    def by_hand(x: Tensor) -> Tensor:
        y = begin if start is None else start(x)
        for t in range(_STEPS):
            y = step(y, x, t)
        return torch.sin(y).sum()

    expected = ravel(torch.func.grad(by_hand)(x))
    if not examined.sampled:
        return examined, Answer(once(0)), expected
    drawn = torch.stack([once(7919 * (examined.seed + 1) + draw) for draw in range(DRAWS)])
    return examined, Answer(drawn.mean(0), DEVIATIONS * float(drawn.std(0).norm()) / math.sqrt(DRAWS)), expected


CHECKS: tuple[Check, ...] = (batch_of_another_step, learning_rate_missing, projection_missing, start_missing)
