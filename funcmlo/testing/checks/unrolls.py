"""Does an unrolled derivative run through all that a step reads: its batch, its learning rate, its projection?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torchopt
from torch import Tensor

from funcmlo.errors import EstimatorError
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel
from funcmlo.testing.checks.base import Check, NotApplicableError, any_level, check, unrolled
from funcmlo.testing.checks.products import judged
from funcmlo.testing.examined import Examined
from funcmlo.testing.matrices import cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding

_STEPS = 3


Step = Callable[[Tensor, Tensor, int], Tensor]
"""y, x, t ↦ the next y."""


@check(any_level, unrolled)
def batch_of_another_step(examined: Examined) -> Finding:
    """Each step is differentiated on its own batch: y ← y − (A_t y − B_t x)."""
    matrices = [(symmetric(3, 3.0, examined.seed + t), cross(3, 2, examined.seed + t)) for t in range(_STEPS)]

    def loss(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * y @ batch[0] @ y - y @ (batch[1] @ x)

    def step(y: Tensor, x: Tensor, t: int) -> Tensor:
        a, b = matrices[t]
        return y - (a @ y - b @ x)

    level = partial(Level, "y", loss, torchopt.sgd(1.0))
    told = "the steps are not differentiated each on its own batch"
    return _compared(examined, level, step, normal(flat(2), examined.seed), told, batches={"y": lambda t: matrices[t]})


@check(any_level, unrolled)
def learning_rate_missing(examined: Examined) -> Finding:
    """A learning rate that is read from the level above has a derivative."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, 1, examined.seed)[:, 0]
    level = partial(Level, "y", lambda y, x: 0.5 * y @ a @ y - y @ b, lambda x: torchopt.sgd(x))
    told = "the derivative does not run through the optimizer's learning rate"
    try:
        rate = torch.tensor(0.7, dtype=torch.float64)
        return _compared(examined, level, lambda y, x, t: y - x * (a @ y - b), rate, told)
    except EstimatorError as error:  # this family's own way to refuse, which is no wrong answer
        raise NotApplicableError(f"it refuses a learned rate: {error}") from error


@check(any_level, unrolled)
def projection_missing(examined: Examined) -> Finding:
    """Steps that end in a projection, y ← tanh(y − ∇g), are differentiated with it."""
    loss, slope = _quadratic(examined, 2)
    level = partial(Level, "y", loss, torchopt.sgd(1.0), project=torch.tanh)
    told = "the derivative does not run through the projection"
    return _compared(examined, level, lambda y, x, t: torch.tanh(y - slope(y, x)), normal(flat(2), examined.seed), told)


@check(any_level, unrolled, lambda e: None if e.estimator.follows_start else "it does not differentiate by the start")
def start_missing(examined: Examined) -> Finding:
    """Where a loop starts at what a level above says, the start has a derivative."""
    loss, slope = _quadratic(examined, 3)
    level = partial(Level, "y", loss, torchopt.sgd(0.3), init=lambda x: 2 * x)
    x, told = normal(flat(3), examined.seed), "the derivative does not run through the loop's start"
    return _compared(examined, level, lambda y, x, t: y - 0.3 * slope(y, x), x, told, start=lambda x: 2 * x)


def _quadratic(examined: Examined, n: int) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """½ yᵀAy − yᵀBx for an x of n numbers, and its slope."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, n, examined.seed)
    return lambda y, x: 0.5 * y @ a @ y - y @ (b @ x), lambda y, x: a @ y - b @ x


def _compared(
    examined: Examined,
    level: Callable[..., Level],
    step: Step,
    x: Tensor,
    told: str,
    *,
    batches: Mapping[str, Any] | None = None,
    start: Callable[[Tensor], Tensor] | None = None,
) -> Finding:
    """Compare the hypergradient of Σ sin y_T with that of the steps by hand."""
    examined = examined.converged
    begin = normal(flat(3), examined.seed + 5)
    lower = level(steps=_STEPS, response=examined.estimator)
    program = Multilevel(lower, Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)))

    def by_hand(x: Tensor) -> Tensor:
        y = begin if start is None else start(x)
        for t in range(_STEPS):
            y = step(y, x, t)
        return torch.sin(y).sum()

    expected = ravel(torch.func.grad(by_hand)(x))
    return judged(examined, examined.program_answer(program, {"y": begin, "x": x}, batches), expected, 1.0, told)


CHECKS: tuple[Check, ...] = (batch_of_another_step, learning_rate_missing, projection_missing, start_missing)
