"""Comparing two methods on the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """What the differences of two methods say, seed by seed.

    Attributes:
        mean: their mean.
        error: its standard error, s/√n with the differences' own standard deviation s; None for one seed.
        wins: how many of them are above zero.
        seeds: how many there are.
    """

    mean: float
    error: float | None
    wins: int
    seeds: int

    def __str__(self) -> str:
        """Write the mean and its error."""
        return f"{self.mean:+.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def paired(method: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Compare a method with a baseline.

    Args:
        method: its accuracy on each seed.
        baseline: the other's, on the same seeds in the same order.

    Returns:
        The comparison.
    """
    differences = [a - b for a, b in zip(method, baseline, strict=True)]
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return Paired(statistics.fmean(differences), error, sum(d > 0 for d in differences), n)
