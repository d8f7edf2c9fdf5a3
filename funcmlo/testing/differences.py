"""Derivatives by extrapolated central differences, with an estimate of their error that is meant to be believed.

D(h) = [φ(h) − φ(−h)]/2h = φ'(0) + c₂h² + c₄h⁴ + …; each extrapolation over steps h, h/4, h/16, … takes the next term
away. The entry of least estimated error is the answer. Three things make the estimate honest: rounding is measured, from
differences of high order at tiny steps; the entry is held against all those of smaller steps; and one-sided slopes
that do not meet (a kink) are told.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ParameterError
from funcmlo.operators import ravel, unravel
from funcmlo.testing.subjects import Subject, direction_like, subject


class Estimate(NamedTuple):
    """A derivative and a bound of its error, trees of one structure.

    Attributes:
        value: the gradient, or the directional derivative.
        error: the estimated error of each entry, infinite where nothing can be said.
    """

    value: Tree
    error: Tree


def finite_difference(function: Any, /, *arguments: Any, direction: Tree = None, **keywords: Any) -> Estimate:
    """Return a gradient by central differences in float64, and its error.

    There are three ways to call it, as for the other oracles:

    - `finite_difference(function, x)`: of a scalar function of a tree;
    - `finite_difference(program, state, batches, of="x")`: of `program.cost` by the parameters of a level;
    - `finite_difference(solve, init, *inputs, batch=None, cotangent=None)`: of ⟨cotangent, y*⟩ by the inputs, a dict by
      name, for what `fm.argmin` and `fm.fixed_point` return; without a cotangent, of the sum of the solution's entries.

    Float32 parameters, states and batches are raised to float64.

    Args:
        function: what is differentiated.
        *arguments: where.
        direction: a tree like the point; without it the whole gradient is taken, one entry at a time.
        **keywords: `of`, `batch`, `cotangent`, and inputs by name.

    Returns:
        Value and error: trees like the point, or 0-d tensors with a direction.

    Raises:
        ParameterError: the arguments are not as expected, or the point has too many entries.
        EstimatorError: the function cannot be evaluated in float64.

    Example:
        >>> import torch, funcmlo as fm
        >>> value, error = finite_difference(lambda x: torch.sin(x).sum(), torch.ones(2))
        >>> value
        tensor([0.5403, 0.5403], dtype=torch.float64)
        >>> bool((error < 1e-9).all())
        True

    References:
        Ridders 1982, Advances in Engineering Software 4(2); Moré and Wild 2011, SIAM J. Sci. Comput. 33(3).
    """
    at = subject(function, *arguments, **keywords)
    if direction is not None:
        slope = along(at, direction_like("direction", at.point, direction))
        return Estimate(*torch.tensor(slope, dtype=torch.float64))
    x = ravel(at.point)
    if x.numel() > _MOST:
        raise ParameterError(
            f"{at.name}: {x.numel():,} entries are too many for one difference each (at most {_MOST:,}); pass "
            "direction=, a tree like the point, for the derivative along it."
        )
    found = [entry(at, x, i) for i in range(x.numel())]
    value, error = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T
    return Estimate(unravel(value, at.point), unravel(error, at.point))


def along(at: Subject, v: Tree, noise: Sequence[tuple[float, float]] | None = None) -> tuple[float, float]:
    """Return the derivative along a direction, and its error.

    Args:
        at: the function and the point.
        v: the direction.
        noise: what `noises` measured along v/‖v‖, if it did.

    Returns:
        The derivative and its error.
    """
    size, length = float(_tree.norm(at.point)), float(_tree.norm(v))
    if not length:
        return 0.0, 0.0
    value, error = derivative(lambda t: at(_tree.add_scaled(at.point, t / length, v)), size, noise)
    return value * length, error * length


def entry(at: Subject, x: torch.Tensor, i: int) -> tuple[float, float]:
    """Return the derivative by one entry, and its error."""

    def moved(t: float) -> float:
        shifted = x.clone()
        shifted[i] += t
        return at(unravel(shifted, at.point))

    return derivative(moved, abs(float(x[i])))


def derivative(
    phi: Callable[[float], float], size: float, noise: Sequence[tuple[float, float]] | None = None
) -> tuple[float, float]:
    """Return φ'(0) and its error, for a φ whose argument is added to something of a given size.

    Args:
        phi: a function of a step; it may be NaN where it is not defined.
        size: how large what the step is added to is; rounding of the sum is relative to it.
        noise: what `noises` measured; None to measure it.

    Returns:
        The derivative and its error.
    """
    zero = phi(0.0)
    if not math.isfinite(zero):
        return math.nan, math.inf
    noise = list(noises(phi, zero, size) if noise is None else noise)
    largest, least = 0.1 * max(1.0, size), 1e-10 * min(1.0, max(size, 1e-8) if size else 1.0)
    samples: list[tuple[float, float, float]] = []
    step = 2.0 ** math.floor(math.log2(largest))  # powers of two add to most numbers without rounding
    while step >= max(least, 4 * EPSILON * size):
        samples.append((step, phi(step), phi(-step)))
        step /= _RATIO
    noise.append((0.0, _quantum(phi, zero, samples)))
    rows: list[_Row] = []
    for step, up, down in samples:
        if math.isfinite(up) and math.isfinite(down):
            rows.append(_row(rows, step, (up - down) / (2 * step), (up - 2 * zero + down) / (2 * step), noise))
        else:
            rows = []
    return _chosen(rows)


def noises(phi: Callable[[float], float], zero: float, size: float) -> list[tuple[float, float]]:
    """Measure how far rounding moves φ: (spacing, noise) pairs, for the steps that are at least so large.

    In a table of differences of order k the smooth part vanishes as (spacing)^k and what is left is noise, amplified by
    √C(2k, k). It counts where the last orders agree, so that it is no smooth part. Noise that is small beside φ counts
    for all steps: a step that is too small for some of φ to answer sees none. What is larger may be an oscillation, which
    smaller steps resolve.

    Args:
        phi: the function.
        zero: φ(0).
        size: how large what its argument is added to is.

    Returns:
        The pairs.
    """
    unit = 2.0 ** math.floor(math.log2(size)) if size else 1.0
    found = [(0.0, 4 * EPSILON * abs(zero))]
    for spacing in (2.0**-40 * unit, 2.0**-27 * unit, 2.0**-14 * unit):
        values = [phi(i * spacing) for i in range(-4, 5)]
        if all(map(math.isfinite, values)):
            levels, table = list[float](), values
            for k in range(1, 7):
                table = [b - a for a, b in itertools.pairwise(table)]
                levels.append(math.sqrt(sum(d * d for d in table) / len(table) / math.comb(2 * k, k)))
            if max(levels[3:]) <= 4 * min(levels[3:]):
                small = levels[-1] <= _SMALL * max(map(abs, values))
                found.append((0.0 if small else spacing, _NOISY * levels[-1]))
    return found


def _quantum(phi: Callable[[float], float], zero: float, samples: Sequence[tuple[float, float, float]]) -> float:
    """The size of φ's steps if it is a staircase: constant over the smallest steps, with few values over the next."""
    resolved = [(step, abs(up - zero), abs(down - zero)) for step, up, down in samples if up != zero or down != zero]
    if not resolved or len(resolved) == len(samples) or (samples[-1][1], samples[-1][2]) != (zero, zero):
        return 0.0
    step, up, down = resolved[-1]
    between = [phi(sign * step * i / 16) for i in range(4, 17) for sign in (-1, 1)]
    return max(up, down) if len({*between} - {zero}) <= 6 else 0.0


def noise_at(noise: Sequence[tuple[float, float]], step: float) -> float:
    """Return the noise that a difference over a step sees."""
    return max(level for spacing, level in noise if spacing <= step)


@dataclass(frozen=True)
class _Row:
    """What a step gave: the extrapolated differences, those of one-sided slopes, what entries changed, and rounding."""

    step: float
    entries: list[float]
    asymmetry: float
    jump: float
    changes: list[float]
    rounding: float


def _row(
    rows: Sequence[_Row], step: float, difference: float, asymmetry: float, noise: Sequence[tuple[float, float]]
) -> _Row:
    entries, changes = [difference], [math.inf]
    for j in range(min(len(rows), _ORDERS)):
        before = rows[-1].entries
        if j >= len(before):
            break
        entries.append(entries[j] + (entries[j] - before[j]) / (_RATIO ** (2 * (j + 1)) - 1))
        changes.append(max(abs(entries[j + 1] - entries[j]), abs(entries[j + 1] - before[j])))
    # Half the difference of the one-sided slopes is h φ''/2 + … where φ is smooth: its part of order h⁰ is a kink's.
    jump = abs(_RATIO * asymmetry - rows[-1].asymmetry) / (_RATIO - 1) if rows else math.inf
    return _Row(step, entries, asymmetry, jump, changes, noise_at(noise, step) / step)


def _chosen(rows: Sequence[_Row]) -> tuple[float, float]:
    """The entry of least estimated error, held against what smaller steps say."""
    candidates = [
        (change + 2 * row.rounding, k, j) for k, row in enumerate(rows) for j, change in enumerate(row.changes) if j
    ]
    if not candidates:
        return math.nan, math.inf
    error, k, j = min(candidates)
    value = rows[k].entries[j]
    for row in rows[k:]:
        change = abs(value - row.entries[j])
        if change > _MARGIN * row.rounding:
            error = max(error, change + _MARGIN * row.rounding)
    sharpest = min(rows[k:], key=lambda row: row.jump + _MARGIN * row.rounding)
    before = rows[max(rows.index(sharpest) - 1, 0)].jump
    falls = math.isfinite(before) and sharpest.jump < before / _RATIO**2
    if sharpest.jump > _MARGIN * sharpest.rounding and not falls:  # where φ is smooth it falls by 4³
        error = max(error, 1.01 * max(row.jump for row in rows[k:]) + _MARGIN * sharpest.rounding)
    return value, error + 4 * EPSILON * abs(value)


EPSILON = 2.0**-52
_RATIO = 4.0
_ORDERS = 4
_NOISY = 4.0  # the root of the mean square against the largest of the few values that are seen
_SMALL = 1e-6
_MARGIN = 8.0
_MOST = 4096
