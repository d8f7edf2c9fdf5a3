"""Is an estimator that draws right on average, and are its draws what they should be?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from funcmlo.operators import ravel
from funcmlo.testing import settings
from funcmlo.testing.checks.base import Check, any_level, check
from funcmlo.testing.examined import DRAWS, Answer, Examined, averaged
from funcmlo.testing.matrices import Batched, Matrices, cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding


def _draws(examined: Examined) -> str | None:
    return None if examined.claims.stochastic else "it does not draw"


def _samples(examined: Examined) -> str | None:
    if not examined.sampled:
        return "it draws no directions"
    return None if settings.counts(examined.estimator) else "its knob does not count samples"


@check(any_level, _draws, lambda e: None if e.sampled else "its draws are batches")
def biased(examined: Examined) -> Finding:
    """The mean over draws is the target."""
    problem, v = Matrices(symmetric(4, 10.0, examined.seed), cross(4, 3, examined.seed)), normal(flat(4), examined.seed + 1)
    examined = examined.converged
    answer, expected = examined.answer(problem, v), examined.target(problem, v)
    return _apart(answer, expected, "the mean over draws is not the target")


@check(any_level, _samples)
def samples_not_averaged(examined: Examined) -> Finding:
    """With b samples the answer is their mean, not their sum: its length does not grow with b."""
    problem, v = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)), normal(flat(3), examined.seed + 1)
    found = settings.knob(examined.converged.estimator)
    assert found is not None  # `_samples` looked
    most = found[1]
    several = examined.converged.answer(problem, v)
    expected = examined.target(problem, v)
    size = float(expected @ expected)
    ratio = float(several.value @ expected) / size
    told = f"with {most} samples the answer is {ratio:.3g} times the target on average"
    told += ": the samples are summed" if abs(ratio / most - 1) < 0.1 else ""
    return Finding(abs(ratio - 1.0), 1e-3 + several.noise / math.sqrt(size), told)


@check(any_level, _samples)
def few_samples_biased(examined: Examined) -> Finding:
    """Two samples, one number above: a mean over b − 1 or b + 1 in place of b would show."""
    found = settings.knob(examined.estimator)
    assert found is not None  # `_samples` looked
    two = settings.put(examined.estimator, found[0], 2)
    problem = Matrices(torch.eye(1).double(), torch.eye(1).double())
    v, start = torch.ones(1).double(), torch.zeros(1).double()
    drawn = []
    for draw in range(256):
        at = examined.at(problem, start=start, steps=1, seed=100_003 * (examined.seed + 1) + draw)
        drawn.append(ravel(two.vjp(at, v, two.init(at.params))[0]["x"]))
    answer = averaged(drawn)
    return _apart(answer, v, f"with two samples the mean is {float(answer.value):.3g} of the target")


@check(any_level, _samples)
def samples_alike(examined: Examined) -> Finding:
    """The variance of the answer falls as the samples grow in number: sixteen times as many, a sixteenth."""
    found = settings.knob(examined.estimator)
    assert found is not None  # `_samples` looked
    problem, v = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 3, examined.seed)), normal(flat(3), examined.seed + 1)
    variances = []
    for samples in (4, 64):
        several = settings.put(examined.estimator, found[0], samples)
        drawn = []
        for draw in range(DRAWS):
            at = examined.at(problem, steps=2, seed=7919 * (examined.seed + 1) + draw)
            drawn.append(ravel(several.vjp(at, v, several.init(at.params))[0]["x"]))
        variances.append(float(torch.stack(drawn).var(0).sum()))
    # The logarithm of a ratio of two such variances is known to about 0.25: 16 is not taken for 4, nor is 1.
    ratio = variances[0] / variances[1] if variances[1] else math.inf
    told = f"with 16 times the samples the variance is divided by {ratio:.2g}: are they drawn independently?"
    return Finding(1 / ratio if ratio else math.inf, 0.25, told)


@check(any_level, _draws)
def draws_repeated(examined: Examined) -> Finding:
    """Another `solved.seed`, or other batches, give another draw: or outer steps would all make one error."""
    noisy = _Noisy(Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)))
    v = normal(flat(3), examined.seed + 1)
    first, *others = (noisy.answer(examined, v, draw) for draw in range(32))  # one sign may come again, 31 hardly
    same = all(torch.equal(first, other) for other in others)
    return Finding(float(same), 0.0, "32 draws gave the same answer; draw from solved.seed")


@check(any_level, _draws, lambda e: "its draws are directions" if e.sampled else None)
def biased_by_batches(examined: Examined) -> Finding:
    """With fresh batches in every product the mean is the answer of the mean batch."""
    problem = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed))
    noisy, v = _Noisy(problem), normal(flat(3), examined.seed + 1)
    answer = averaged([noisy.answer(examined, v, draw) for draw in range(64)])
    expected = ravel(examined.estimator.vjp(examined.at(problem), v, examined.estimator.init(flat(3)))[0]["x"])
    return _apart(answer, expected, "the mean over batches is not the answer of their mean")


@dataclass(frozen=True)
class _Noisy:
    """A problem whose batches after the inner loop are independent and disturb A and B without bias."""

    problem: Matrices

    def answer(self, examined: Examined, v: Tensor, draw: int) -> Tensor:
        """Return the answer of one draw of batches and seed, at the solution of the mean problem."""
        a, b = self.problem.a, self.problem.b

        def batch(t: int) -> dict[str, Tensor]:
            if not t:  # the inner loop's
                return {"a": a, "b": b}
            seed = 100_003 * (draw + 1) + 17 * t
            e = normal(a, seed)
            return {"a": a + 0.05 * (e + e.T), "b": b + 0.2 * normal(b, seed + 1)}

        noisy = Batched(a, b)
        at = examined.at(
            noisy, start=self.problem.solution(self.problem.x(examined.seed)), steps=1, batches=batch, seed=draw
        )
        return ravel(examined.estimator.vjp(at, v, examined.estimator.init(at.params))[0]["x"])


def _apart(answer: Answer, expected: Tensor, message: str) -> Finding:
    size = float(expected.norm()) or 1.0
    away = float((answer.value - expected).norm()) / size
    return Finding(
        away, 1e-6 + answer.noise / size, f"{message}: {away:.2g} of it away, {answer.noise / size:.2g} is chance"
    )


CHECKS: tuple[Check, ...] = (
    biased,
    samples_not_averaged,
    few_samples_biased,
    samples_alike,
    draws_repeated,
    biased_by_batches,
)
