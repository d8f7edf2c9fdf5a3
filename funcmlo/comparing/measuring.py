"""What one estimator costs and how far off it is: a row of a comparison."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from funcmlo import _diff, _tree
from funcmlo._tree import Tree
from funcmlo.comparing.peak_memory import peak_memory
from funcmlo.comparing.reference import flat, relative
from funcmlo.comparing.substitution import Answer, Nothing, Place, Record, Watched
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.state import State


@dataclass(frozen=True)
class Row:
    """One estimator in a comparison. Everything relative is relative to the reference's norm.

    Attributes:
        name: what it is called.
        estimator: the estimator itself, ready for `Level(response=…)`.
        error: ‖a − r‖ / ‖r‖ for its answer a and the reference r; for a stochastic one the root mean square over draws.
        cosine: of the angle between a and r; for a stochastic one the mean over draws.
        bias: ‖mean of the draws − r‖ / ‖r‖ of a stochastic one. Without any bias it is about `bias_error`.
        bias_error: the standard error of that mean, √(variance / samples), relative.
        variance: E ‖a − E a‖² / ‖r‖² of one draw.
        seconds: what it adds to the inner loops, which all share: its products, and its recording of the loops.
        hvps: Hessian-vector products.
        gradients: gradients of the lower cost.
        steps: inner steps that were differentiated.
        replayed: inner steps that were made again.
        iterations: of its linear solver; None without one.
        residual: of its linear system, as its solver knows it; None without one.
        memory: the most bytes of tensors alive at once in the whole call, inner loops included, beyond those before it.
        gradient: its answer a; of a stochastic one the first draw.
        samples: how many draws were made; 1 for one that is not stochastic.
        notes: the library's warnings, and what else is to be known.
        reason: why there is no answer; None where there is one.
    """

    name: str
    estimator: BestResponse
    error: float | None = None
    cosine: float | None = None
    bias: float | None = None
    bias_error: float | None = None
    variance: float | None = None
    seconds: float | None = None
    hvps: int | None = None
    gradients: int | None = None
    steps: int | None = None
    replayed: int | None = None
    iterations: int | None = None
    residual: float | None = None
    memory: int | None = None
    gradient: Tree = field(default=None, repr=False)
    samples: int = 1
    notes: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Inner:
    """How well a lower level is solved where the hypergradient is taken.

    Attributes:
        stationarity: ‖∇_y g(y_T)‖, on the last inner step's batch.
        relative: that over its value where the inner loop began; None without inner steps.
    """

    stationarity: float
    relative: float | None


@dataclass(frozen=True)
class Shared:
    """What all estimators share: the inner loops, the upper cost and its direct gradient."""

    seconds: float
    memory: int
    inner: Mapping[str, Inner]


def tried(place: Place, name: str, estimator: BestResponse, state: State, batches: Mapping[str, Any]) -> Row:
    """Make the first run of an estimator, and keep what goes wrong in it.

    Args:
        place: where it is put.
        name: what it is called.
        estimator: the estimator.
        state: where the program stands.
        batches: its batches.

    Returns:
        Its row with its answer, what its stats say and its memory; or with the reason for which there is none.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer, memory = peak_memory(lambda: place.run(estimator, state, batches, warn=True))
        except Exception as error:  # a row with the reason: the others are compared all the same
            lines = str(error).splitlines()
            why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            return Row(name, estimator, reason=why)
    notes = tuple(dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught))
    stats = _together(answer)
    return Row(name, estimator, **stats, memory=memory, gradient=answer.gradient, notes=notes)


def shared(place: Place, state: State, batches: Mapping[str, Any]) -> Shared:
    """Measure the memory of what all share, and how well the lower levels are solved (seconds come later).

    Args:
        place: where estimators are put.
        state: where the program stands.
        batches: its batches.

    Returns:
        The numbers.
    """
    record = Record()
    answer = place.run(Watched(Nothing(), record), state, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, memory = peak_memory(lambda: place.run(Nothing(), state, batches))
    inner = {}
    if place.program.composition == "paths":  # else its costs have solutions inside, which are gone
        inner = {name: _inner(solved) for name, solved in zip(answer.stats, record.solved, strict=True)}
    return Shared(answer.seconds, memory, inner)


def timed(
    place: Place, rows: Sequence[Row], state: State, batches: Mapping[str, Any], repeats: int
) -> tuple[list[Row], float]:
    """Time the estimators, interleaved.

    Args:
        place: where they are put.
        rows: those that have an answer are timed.
        state: where the program stands.
        batches: its batches.
        repeats: how often.

    Returns:
        The rows with their seconds, and the median of the seconds that all share.
    """
    loops: list[float] = []
    own: list[list[float]] = [[] for _ in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats):
            loops.append(place.run(Nothing(), state, batches).seconds)
            for row, found in zip(rows, own, strict=True):
                if row.reason is None:
                    record = Record()
                    whole = place.run(Watched(row.estimator, record), state, batches).seconds
                    extra = max(0.0, whole - record.seconds - loops[-1]) if _changes_loop(place, row.estimator) else 0.0
                    found.append(record.seconds + extra)
    medians = [statistics.median(found) if found else None for found in own]
    return [replace(row, seconds=s) for row, s in zip(rows, medians, strict=True)], statistics.median(loops)


def against(row: Row, reference: Tree) -> Row:
    """Return a row with the distance of its answer from the reference.

    Args:
        row: a row with an answer; another comes back as it is.
        reference: the reference's gradient.

    Returns:
        The row.
    """
    if row.reason is not None:
        return row
    a, r = flat(row.gradient), flat(reference)
    return replace(row, error=relative(row.gradient, reference), cosine=_cosine(a, r))


def sampled(place: Place, row: Row, state: State, batches: Mapping[str, Any], reference: Tree, samples: int) -> Row:
    """Draw again and again, with the same inner loop, loss and last batch, and compare the distribution.

    Args:
        place: where the estimator is put.
        row: its row, with its first draw.
        state: where the program stands.
        batches: its batches.
        reference: the reference's gradient.
        samples: how many independent draws, the first included.

    Returns:
        The row with bias, variance and root mean square error; unchanged for an estimator that does not draw.
    """
    if row.reason is not None or not row.estimator.claims.stochastic:
        return row
    draws, skipped, notes = [flat(row.gradient)], 0, list(row.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = Record()  # tells how many fresh batches one draw takes
        place.run(Watched(row.estimator, first), state, batches)
        for i in range(1, samples):
            skipped += first.drawn
            try:
                answer = place.run(Watched(row.estimator, Record(), draw=i, skipped=skipped), state, batches)
            except Exception as error:  # no more batches, say
                lines = str(error).splitlines() or [type(error).__name__]
                notes.append(f"only {len(draws)} of {samples} draws could be made: {lines[0][:120]}")
                break
            draws.append(flat(answer.gradient))
    if first.drawn and not any(callable(batches.get(name)) for name in place.through):
        notes.append("its fresh batches are all the same one, because the batch is fixed; give a function of the step")
    if len(draws) < 2:
        return replace(row, notes=tuple(notes))
    a, r = torch.stack(draws), flat(reference)
    n, norm, mean = len(draws), float(r.norm()), a.mean(0)
    unit = norm or float("nan")
    variance = float(((a - mean) ** 2).sum()) / (n - 1)
    cosines = [c for c in (_cosine(x, r) for x in a) if c is not None]
    return replace(
        row,
        error=float(((a - r) ** 2).sum(1).mean().sqrt()) / unit,
        cosine=statistics.fmean(cosines) if cosines else None,
        bias=float((mean - r).norm()) / unit,
        bias_error=(variance / n) ** 0.5 / unit,
        variance=variance / unit**2,
        samples=n,
        notes=tuple(notes),
    )


def _together(answer: Answer) -> dict[str, Any]:
    """The stats of all levels together, as fields of a row."""
    found = answer.stats.values()
    if all(isinstance(stats, Stats) for stats in found):
        total = sum(found, Stats(products=0))
        names = ("hvps", "gradients", "steps", "replayed", "iterations", "residual")
        return {name: getattr(total, name) for name in names}
    told = [name for name in ("hvps", "gradients", "steps", "replayed") if all(name in stats for stats in found)]
    return {name: sum(int(stats[name]) for stats in found) for name in told}


def _changes_loop(place: Place, estimator: BestResponse) -> bool:
    """Whether the inner loop, or what is done outside of its products, is another one because of the estimator."""
    levels = {level.name: level for level in place.program.levels}
    kept = any(estimator.keep(levels[name].steps).before for name in place.through)
    return kept or estimator.requires != "solution" or place.program.composition == "nested"


def _inner(solved: Solved) -> Inner:
    at, began = (_slope(solved, y) for y in (solved.params, solved.init[0]))
    return Inner(at, (at / began if began else None) if solved.steps else None)


def _slope(solved: Solved, y: Tree) -> float:
    """‖∇_y g‖."""
    _, _, (gradient,), _ = _diff.value_and_grads(lambda at: (solved.loss(at, solved.inputs), None), [y])
    return float(_tree.norm(_tree.detach(gradient)))


def _cosine(a: Any, r: Any) -> float | None:
    norms = float(a.norm() * r.norm())
    return min(1.0, max(-1.0, float(a @ r) / norms)) if norms else None
