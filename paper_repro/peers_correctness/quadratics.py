"""Questions on quadratics: condition, the identity, coupled blocks, small curvature, a missing direct gradient, NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from funcmlo.testing import Quadratic
from paper_repro.peers_correctness.problem import Params, Question
from paper_repro.peers_correctness.reference import flat, parts

SHRINK = 18.5
"""(1 − 1/κ)^(18.5 κ) < 1e-8."""


def quadratic(
    seed: int, name: str, seen: str, condition: float = 3.0, shapes: dict[str, tuple[int, ...]] | None = None
) -> Question:
    """Return g = ½ yᵀAy − yᵀBx, f = Σ sin y + ½ ‖x‖², with eigenvalues of A from 1/condition to 1, begun at y*.

    Args:
        seed: decides all numbers.
        name: the column's heading.
        seen: what a wrong answer shows.
        condition: of A.
        shapes: of y's tensors; one of six numbers by default.

    Returns:
        The question.
    """
    y = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in (shapes or {"y": (6,)}).items()}
    known = Quadratic(seed=seed, condition=condition, y_like=y, x_like=torch.zeros(4, dtype=torch.float64))
    terms = int(SHRINK * condition) + 1
    solution = known.solution()
    return Question(
        name, seen, known.inner, known.outer, known.x, solution, solution, rate=1.0, steps=terms, curvature=1.0, terms=terms
    )


def well_conditioned(seed: int) -> Question:
    """Condition 3, one tensor."""
    return quadratic(seed, "quadratic", "anything at all")


def ill_conditioned(seed: int, condition: float) -> Question:
    """The same with a large condition, and as many steps and terms as it needs."""
    return quadratic(seed, f"cond. {condition:g}", "a solver that stops too early", condition)


def coupled(seed: int) -> Question:
    """Condition 10, three tensors of different shapes whose Hessian is full across them."""
    shapes = {"a": (2, 2), "b": (3,), "c": (1,)}
    return quadratic(seed, "blocks", "an inverse that keeps only the blocks on the diagonal", 10.0, shapes)


def twice_identity(seed: int) -> Question:
    """H = 2I: conjugate gradient is done after one product."""
    base = quadratic(seed, "H = 2I", "a CG that goes on, or returns the iterate before the converged one")
    b = parts(base, base.start["y"])[3]

    def inner(y: Params, x: Tensor) -> Tensor:
        return torch.dot(y["y"], y["y"] + b.to(x) @ x)

    solution = {"y": -b @ base.x / 2}
    return replace(base, inner=inner, start=solution, solution=solution, rate=0.4, steps=20, curvature=2.0, terms=20)


def no_direct(seed: int) -> Question:
    """Return the first one with an f that reads y alone."""
    base = quadratic(seed, "no ∇ₓf", "a direct gradient that is taken for granted")
    return replace(base, outer=lambda x, y: torch.sin(flat(y)).sum())


def small(seed: int) -> Question:
    """A and B times 1e-6, float32, with the rate 1e6 that suits it: the hypergradient is as before."""
    return _single(seed, "small H", "a curvature that is lost in float32", scale=1e-6, rate=1e6)


def small_rate(seed: int) -> Question:
    """The same with rate 1 and a loop that is solved where it starts: 1 − lr·H is 1 in float32."""
    return replace(
        _single(seed, "small H, rate 1", "products made as v − (v − lr·Hv), which cancel", scale=1e-6, rate=1.0),
        steps=2,
        rate_converges=False,
    )


def undefined(seed: int) -> Question:
    """Multiply y by a NaN in f, as a broken validation batch does: there is no answer but NaN, or an error."""
    base = quadratic(seed, "NaN", "a NaN that becomes zero")
    weights = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    return replace(base, outer=lambda x, y: (y["y"] * weights).sum() + (x**2).sum(), defined=False)


def undefined_slope(seed: int) -> Question:
    """Add √(0·y) to f, whose value is 0 and whose slope is 0·∞: a finite loss with a NaN gradient."""
    base = quadratic(seed, "NaN slope", "a NaN gradient of a finite loss that becomes zero")
    return replace(base, outer=lambda x, y: y["y"].sum() + (0 * y["y"]).sqrt().sum() + (x**2).sum(), defined=False)


def _single(seed: int, name: str, seen: str, scale: float, rate: float) -> Question:
    base = quadratic(seed, name, seen)
    cost: Callable[[Params, Tensor], Tensor] = base.inner
    start = {key: p.float() for key, p in base.start.items()}
    return replace(
        base,
        inner=lambda y, x: scale * cost(y, x),
        x=base.x.float(),
        start=start,
        solution={key: p.double() for key, p in start.items()},
        rate=rate,
        curvature=scale,
        tolerance=1e-3,  # ε = 1.2e-7 times the condition and a hundred operations
    )
