"""torchopt 0.7 keeps the settings of its transformations and schedules in closures; this reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def maker(function: Callable[..., Any]) -> str:
    """Return the name of torchopt's function that made another; empty if none did."""
    if (getattr(function, "__module__", None) or "").partition(".")[0] != "torchopt":
        return ""
    return getattr(function, "__qualname__", "").partition(".<locals>")[0]


def closed_over(*functions: Any) -> dict[str, Any]:
    """Return what functions close over, by name; a name that was never bound is left out."""
    found = {}
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                found[name] = cell.cell_contents
            except ValueError:  # an empty cell
                continue
    return found
