"""What compiles a program's steps and products, and remembers what came of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcmlo.errors import FuncmloWarning
from funcmlo.recording.code import Make
from funcmlo.recording.inductor import compiled
from funcmlo.recording.tape import below_autograd

DIGITS = 2.0**10
"""How many machine epsilons a compiled answer may be away from the eager one, relative to the largest number of its kind."""

UNFIT = "its first answer is not finite, so that nothing can be held against it"
"""Why a function is not compiled yet."""

Answer = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""Results and products."""

Reference = Callable[[Sequence[Tensor]], Answer]
"""reference(varying ones, fixed ones, cotangents) → what a recorded function comes to as it is written."""


@dataclass(frozen=True)
class Compilation:
    """What came of compiling one function.

    Attributes:
        name: its level and what it is.
        seconds: how long it took.
        difference: the largest difference from the eager answer at first use, in machine epsilons of the largest number.
        why: why it is evaluated as it is written; None where it is compiled.
    """

    name: str
    seconds: float = 0.0
    difference: float = 0.0
    why: str | None = None

    def __str__(self) -> str:
        """Say it in a line."""
        if self.why is not None:
            return f"{self.name}: not compiled, {self.why}"
        return f"{self.name}: compiled in {self.seconds:.1f} s, within {self.difference:.0f} ε of the eager answer"


@dataclass(eq=False)
class Compiler:
    """Compiled functions by level, for as long as the program lives.

    Attributes:
        told: what came of each, in order.
    """

    told: list[Compilation] = field(default_factory=list)
    _levels: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def of(self, level: str) -> dict[Any, Any]:
        """Return what is known of a level's functions, to be added to."""
        return self._levels.setdefault(level, {})

    def make(
        self,
        name: str,
        settings: tuple[Any, ...],
        reference: Reference,
        outside: Sequence[Tensor],
        tensors: Sequence[Tensor],
        *,
        moves: bool = True,
    ) -> Make | str:
        """Compile a divided tape and hold it against what it is compiled from.

        Args:
            name: what it is.
            settings: the arguments of `compiled`.
            reference: the function that was recorded, as it is written.
            outside: what its `make` takes.
            tensors: the tensors that it was recorded on: varying ones, fixed ones, cotangents.
            moves: whether its first results are what varies, moved on.

        Returns:
            The compiled one; or why the eager one is to be used.
        """
        parts, varying, cotangents, _ = settings
        begun = time.perf_counter()
        why: str | None = None
        difference = 0.0
        if parts.draws:
            why = "it draws random numbers, which compiled code draws in another order"
        else:
            try:
                made = compiled(*settings)
                given = tensors[:varying], arbitrary([tensors[n] for n in cotangents])
                expected = reference([*tensors[: len(tensors) - len(cotangents)], *given[1]])
                if not all(bool(x.isfinite().all()) for part in expected for x in part if x is not None):
                    return UNFIT
                difference = apart(answer(made, outside, *given), expected, given[0] if moves else ())
                if not difference <= DIGITS:
                    why = f"its answer differs from the eager one by {difference:.0f} machine epsilons of the largest number"
            except Exception as error:  # whatever a compiler comes upon: the eager answer is always there
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        if why is not None:
            return why
        self.told.append(Compilation(name, time.perf_counter() - begun, difference))
        return made

    def refuse(self, name: str, why: str | None) -> None:
        """Note that a function is evaluated as it is written, and say so once.

        Args:
            name: what it is.
            why: the reason.
        """
        self.told.append(Compilation(name, why=why))
        warnings.warn(f"{self.told[-1]}; it runs as it is written.", FuncmloWarning, stacklevel=2)

    def __str__(self) -> str:
        """List what came of everything so far."""
        return "\n".join(map(str, self.told)) or "nothing has been compiled yet"


def arbitrary(like: Sequence[Tensor]) -> list[Tensor]:
    """Return normally distributed tensors of the same forms, drawn from a generator of their own.

    Args:
        like: the tensors.

    Returns:
        As many.
    """
    own = torch.Generator().manual_seed(0)
    return [torch.empty_like(x).copy_(torch.randn(x.shape, generator=own, dtype=torch.float64)) for x in like]


def answer(make: Make, outside: Sequence[Tensor], varying: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Answer:
    """Return what a divided tape comes to: its results and its products.

    Args:
        make: the tape as code.
        outside: what is the same for a loop.
        varying: what varies.
        cotangents: what is pulled back.

    Returns:
        Both.
    """
    with below_autograd():
        forward, backward = make(outside)
        results, kept = forward(*varying)
        return results, backward(kept, *cotangents)


def apart(found: Answer, expected: Answer, varying: Sequence[Tensor]) -> float:
    """Return how far two answers are apart, in machine epsilons of the largest number of a group.

    A group is: by how much what varies was moved, apart from its own rounding; the other results; the products by what
    varies; the other products. What is zero but for rounding, as the gradient of attention's key bias is, is no measure.

    Args:
        found: results and products.
        expected: those that they should be.
        varying: what the first results are moved from; nothing where they are not.

    Returns:
        The largest distance.
    """
    n = len(varying)
    moved = [
        (a, b, y)
        for a, b, y in zip(found[0], expected[0], varying, strict=False)
        if a is not None and b is not None and b.is_floating_point() and b.numel() and b.shape == y.shape
    ]
    groups = [
        [_pair(a, b, (b - y).abs(), b.abs()) for a, b, y in moved],
        [_pair(a, b, b.abs()) for a, b in _both(found[0][n:], expected[0][n:])],
        [_pair(a, b, b.abs()) for a, b in _both(found[1][:n], expected[1][:n])],
        [_pair(a, b, b.abs()) for a, b in _both(found[1][n:], expected[1][n:])],
    ]
    if [x is None for part in found for x in part] != [x is None for part in expected for x in part]:
        return float("inf")
    return max((error / max(size for _, size in group) for group in groups for error, _ in group), default=0.0)


def _both(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(found, expected, strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None and b.is_floating_point() and b.numel()]


def _pair(a: Tensor, b: Tensor, size: Tensor, rounded: Tensor | None = None) -> tuple[float, float]:
    """The largest difference beyond rounding, in epsilons, and the largest number."""
    epsilon = torch.finfo(b.dtype).eps
    apart = (a - b).abs() / epsilon - (0 if rounded is None else 2 * rounded)
    both_nan = a.isnan() & b.isnan()
    return float(torch.where(both_nan, 0, apart).max().clamp(min=0)), float(size.max().clamp(min=torch.finfo(b.dtype).tiny))
