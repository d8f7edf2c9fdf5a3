"""How the memory of a best response grows with the inner steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.checkpoint import Checkpoint
from funcmlo.hypergrad.itd import ITD


@dataclass(frozen=True)
class Law:
    """A law of growth: peak(T) = a + b · count(T) from a few steps on.

    Attributes:
        words: the law as it is told.
        count: T ↦ how many of what grows are held at once.
    """

    words: str
    count: Callable[[int], int]


def law(response: BestResponse) -> Law:
    """Return the law of a response.

    Args:
        response: an estimator; of one that is not this package's own, what it asks for says what is kept for it.

    Returns:
        The law.
    """
    if not isinstance(response, ITD):
        keeps = response.requires == "trajectory" or bool(response.keep(3).before)
        return Law("a + b·T", lambda t: t) if keeps else Law("flat", lambda t: 0)
    window = response.window

    def within(count: Callable[[int], int]) -> Callable[[int], int]:
        return count if window is None else lambda t: count(min(t, window))

    short = "T" if window is None else f"min(T, {window})"
    if response.mode == "forward":
        return Law("flat", lambda t: 0)
    if isinstance(response.memory, Checkpoint):
        schedule, k = response.memory, response.memory.arity
        words = f"a + b·2√{short}" if k is None else f"a + b·{k - 1}·log_{k} {short}"
        return Law(words, within(lambda t: standings(schedule, t)))
    return Law(f"a + b·{short}", within(lambda t: t))


def standings(schedule: Any, steps: int, depth: int = 0) -> int:
    """Return how many standings a schedule of checkpoints holds at most.

    Args:
        schedule: it.
        steps: T.
        depth: how often the loop has been cut already.

    Returns:
        The number, that before the step that is differentiated included.

    Example:
        >>> standings(Checkpoint(), 100), standings(Checkpoint(arity=2), 1024)
        (19, 11)
    """
    cuts = schedule.cuts(0, steps, depth) if steps > 1 else [0]
    # The first part is the longest, and what is kept of the others may stay until it is through.
    return len(cuts) - 1 + standings(schedule, cuts[1], depth + 1) if len(cuts) > 1 else 1
