"""Which standings of an inner loop are kept, and which are made again: checkpoint schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

from funcmlo.errors import DefinitionError


@dataclass(frozen=True)
class Checkpoint:
    """Keep a few standings of the inner loop and run it again, to the bit, from the last one before each step.

    With the default, √T segments of √T steps: 2√T standings at most, every step made up to three times (in the loop, again
    from its segment's start, and to be differentiated). With `arity=k`, each segment is cut into k again and again:
    1 + (k − 1)⌈log_k T⌉ standings, every step made up to 1 + ⌈log_k T⌉ times.

    Args:
        arity: k ≥ 2; None for √T.
        mixed: whether each step is differentiated in mixed mode (see `ITD`), which saves the activations' memory too.

    Raises:
        DefinitionError: the arity is no integer of at least 2.

    Example:
        >>> Checkpoint().cuts(0, 100)[:4], Checkpoint(arity=2).cuts(0, 100)
        ([0, 10, 20, 30], [0, 50])

    References:
        Griewank 1992, Achieving logarithmic growth of temporal and spatial complexity; Chen et al. 2016, arXiv
        1604.06174; Engstrom et al. 2025 (REPLAY), arXiv 2503.13751.
    """

    arity: int | None = None
    mixed: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        k = self.arity
        if k is not None and (isinstance(k, bool) or not isinstance(k, Integral) or k < 2):
            raise DefinitionError(f"Checkpoint(arity={k!r}): expected an integer of at least 2, or None for √T.")
        if not isinstance(self.mixed, bool):
            raise DefinitionError(f"Checkpoint(mixed={self.mixed!r}): expected True or False.")

    def cuts(self, first: int, last: int, depth: int = 0) -> list[int]:
        """Return where the segment of the steps first ≤ t < last is cut.

        Args:
            first: its first step.
            last: the step after its last.
            depth: how often the whole loop has been cut to get here.

        Returns:
            The first step of each part, in order.
        """
        steps = last - first
        parts = self.arity or (math.isqrt(steps - 1) + 1 if depth == 0 else steps)
        length = -(-steps // parts)
        return list(range(first, last, length))


@dataclass(frozen=True)
class Every:
    """The schedule that keeps the standing before every step."""

    mixed: bool = False

    def cuts(self, first: int, last: int, depth: int = 0) -> list[int]:
        """Return every step."""
        del depth
        return list(range(first, last))
