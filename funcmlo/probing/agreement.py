"""Derivatives held against central differences whose own error is estimated.

With d(h) = [g(+h) − g(−h)] / 2h along a direction v, d(h) − d(h/2) tells truncation and noise. A kink at the point itself
leaves d(h) alone and shows in the second difference: k(h) = [g(+h) − 2g(0) + g(−h)] / h halves with h where g is smooth, so
2k(h/2) − k(h) vanishes there and is the jump of the slope at a kink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = list[Tensor]

_STEPS = (1 / 3, 1 / 2, 3 / 5)
"""Powers of the precision that are tried as steps: the first balances truncation and rounding where all is smooth."""


@dataclass(frozen=True)
class Agreement:
    """How a derivative compares with differences.

    Attributes:
        ok: whether they agree within the differences' own error.
        settled: whether that error is small enough to say so.
        number: the relative gap over everything.
        worst: the numbers of the tensors that disagree, the widest gap first.
        zero: whether the derivative is exactly zero on the first of those.
        resolved: whether the function changed at all along the step.
    """

    ok: bool
    settled: bool
    number: float
    worst: tuple[int, ...] = ()
    zero: bool = False
    resolved: bool = True


def direction(like: Sequence[Tensor]) -> Vector:
    """Draw a direction in which every tensor moves in proportion to its own size."""
    generator = torch.Generator().manual_seed(20)
    sizes = [float(x.square().mean().sqrt()) if x.numel() else 0.0 for x in like]
    whole = max(sizes, default=0.0) or 1.0
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in like]
    return [(size or whole) * d.to(x) for size, d, x in zip(sizes, drawn, like, strict=True)]


def compare(claimed: Vector, slope: Callable[[Vector], Vector], at: Vector, along: Vector, epsilon: float) -> Agreement:
    """Compare a directional derivative with central differences.

    Where they do not settle, the step is made shorter: among a network's many kinks, few lie within a short step.

    Args:
        claimed: the derivative of `slope` along the direction.
        slope: the function that is differenced, of the tensors that move.
        at: where.
        along: v.
        epsilon: the precision in which the function computes.

    Returns:
        The comparison, tensor by tensor, at the longest step that settles; else at the shortest.
    """
    start = slope(at)
    found = _compared(claimed, slope, start, at, along, epsilon, epsilon ** _STEPS[0])
    for power in _STEPS[1:]:
        if found.settled:
            break
        closer = _compared(claimed, slope, start, at, along, epsilon, epsilon**power)
        if not closer.resolved:  # the step drowned in a precision that is less than it was said to be
            break
        found = closer
    return found


def _compared(
    claimed: Vector,
    slope: Callable[[Vector], Vector],
    start: Vector,
    at: Vector,
    along: Vector,
    epsilon: float,
    h: float,
) -> Agreement:
    def moved(step: float) -> Vector:
        return slope([x + step * v for x, v in zip(at, along, strict=True)])

    wide, narrow = (list(zip(moved(s), start, moved(-s), strict=True)) for s in (h, h / 2))
    better = [_central(values, h / 2) for values in narrow]
    whole = max(norm(better), norm(claimed))
    gaps, errors, bad = [], [], []
    for i, (c, d, w, n) in enumerate(zip(claimed, better, wide, narrow, strict=True)):
        # Estimated, therefore ten times; then the rounding of what is differenced, and h for what both leave out.
        error = 10 * (norm([_central(w, h) - d]) + norm([2 * _second(n, h / 2) - _second(w, h)]))
        error += 100 * epsilon / h * norm([start[i]])
        gaps.append(norm([c - d]))
        errors.append(error)
        if not gaps[i] <= error + h * max(norm([c]), norm([d])) + 1e-3 * h * whole:
            bad.append(i)
    bad.sort(key=lambda i: -gaps[i])
    return Agreement(
        ok=not bad,
        settled=_length(errors) <= 0.1 * whole or not any(gaps),
        number=_length(gaps) / whole if whole else 0.0,
        worst=tuple(bad),
        zero=bool(bad) and not bool(claimed[bad[0]].any()),
        resolved=any(bool(d.any()) for d in better),
    )


def apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the relative distance of two lists of tensors."""
    size = max(norm(a), norm(b))
    return norm([x - y for x, y in zip(a, b, strict=True)]) / size if size else 0.0


def _central(values: tuple[Tensor, Tensor, Tensor], h: float) -> Tensor:
    ahead, _, behind = values
    return (ahead - behind) / (2 * h)


def _second(values: tuple[Tensor, Tensor, Tensor], h: float) -> Tensor:
    ahead, here, behind = values
    return (ahead - 2 * here + behind) / h


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm over all tensors."""
    return float(sum(float(x.double().square().sum()) for x in tensors) ** 0.5)


def _length(numbers: Sequence[float]) -> float:
    return float(sum(x * x for x in numbers) ** 0.5)
