"""What a check is, and when it applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from funcmlo.testing.examined import Examined
from funcmlo.testing.outcome import Finding

Reason = Callable[[Examined], str | None]
"""Says why a check does not apply to an estimator; None where it does."""


class NotApplicableError(Exception):
    """Raised by a check that finds, as it runs, that it does not apply; its message says why."""


@dataclass(frozen=True)
class Check:
    """One property of an estimator, under a name that says what is wrong where it fails.

    Attributes:
        name: the name.
        run: measures it.
        skip: says why the estimator promises nothing of the kind.
    """

    name: str
    run: Callable[[Examined], Finding]
    skip: Reason


def check(*reasons: Reason) -> Callable[[Callable[[Examined], Finding]], Check]:
    """Make a check of a function, named after it.

    Args:
        *reasons: the first that speaks up is why the check is skipped.

    Returns:
        The decorator.
    """

    def make(function: Callable[[Examined], Finding]) -> Check:
        def skip(examined: Examined) -> str | None:
            return next((why for reason in reasons if (why := reason(examined)) is not None), None)

        return Check(function.__name__, function, skip)

    return make


def any_level(examined: Examined) -> str | None:
    """Skip estimators that answer for the one level that they were made for."""
    return "it answers for a level of its own alone: hand in problems=[…] of that level" if examined.own else None


def implicit(examined: Examined) -> str | None:
    """Skip estimators that do not invert."""
    return None if examined.claims.target == "implicit" else f"its target is the {examined.claims.target} derivative"


def unrolled(examined: Examined) -> str | None:
    """Skip estimators that do not follow the inner steps."""
    return None if examined.unrolled else f"its target is the {examined.claims.target} derivative"


def exact(examined: Examined) -> str | None:
    """Skip estimators that do not claim to be exact."""
    return None if examined.claims.exact else "it does not claim to be exact"


def settled(examined: Examined) -> str | None:
    """Skip estimators that draw."""
    return "its answers are drawn" if examined.claims.stochastic else None


def sized(examined: Examined) -> str | None:
    """Skip estimators that promise a direction alone."""
    return None if examined.promises_size else "it promises a direction, no size"
