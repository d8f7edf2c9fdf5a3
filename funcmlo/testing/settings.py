"""Reading and turning an estimator's settings: its knob and its damping."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from numbers import Integral
from typing import Any

from funcmlo.hypergrad.base import BestResponse

_PARTS = ("solver", "curvature")


def owners(estimator: Any, field: str) -> Iterator[tuple[str, ...]]:
    """Go through the places of an estimator, its solver and its curvatures where a setting of this name is.

    Args:
        estimator: the estimator.
        field: the setting's name.

    Yields:
        The path of attribute names from the estimator to the setting.
    """
    if hasattr(estimator, field):
        yield (field,)
    for part in _PARTS:
        inner = getattr(estimator, part, None)
        if inner is not None and not isinstance(inner, (str, int, float)):
            for path in owners(inner, field):
                yield (part, *path)


def get(estimator: Any, path: tuple[str, ...]) -> Any:
    """Return a setting.

    Args:
        estimator: the estimator.
        path: from `owners`.

    Returns:
        Its value.
    """
    for name in path:
        estimator = getattr(estimator, name)
    return estimator


def put(estimator: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a copy of an estimator with a setting changed.

    Args:
        estimator: the estimator; frozen or not, a dataclass or not.
        path: from `owners`.
        value: the new value.

    Returns:
        The copy.
    """
    first, *rest = path
    changed = copy.copy(estimator)
    object.__setattr__(changed, first, put(getattr(estimator, first), tuple(rest), value) if rest else value)
    if hasattr(type(changed), "__post_init__"):
        changed.__post_init__()
    return changed


def knob(estimator: BestResponse) -> tuple[tuple[str, ...], Any] | None:
    """Return where the estimator's knob is, and how it stands.

    Args:
        estimator: the estimator.

    Returns:
        The path and the value; None where it has none, or has not the field that it names.
    """
    name = estimator.claims.knob
    path = next(owners(estimator, name), None) if name else None
    return None if path is None else (path, get(estimator, path))


def counts(estimator: BestResponse) -> bool:
    """Say whether the estimator's knob counts something, as iterations or samples do."""
    found = knob(estimator)
    return found is not None and isinstance(found[1], Integral) and not isinstance(found[1], bool)


def dampings(estimator: BestResponse) -> list[tuple[tuple[str, ...], float]]:
    """Return where the estimator has a damping λ of the system (H + λI)w = v, and how it stands.

    Args:
        estimator: the estimator.

    Returns:
        Paths and values; a solver inside another solver has a system of its own and does not count.
    """
    paths = [path for path in owners(estimator, "damping") if path.count("solver") < 2]
    values = [(path, get(estimator, path)) for path in paths]
    return [
        (path, float(value)) for path, value in values if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
