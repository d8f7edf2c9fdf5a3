"""Finiteness, checked once per outer step and outside every transform, in the order in which things arise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcmlo.errors import NonFiniteError
from funcmlo.sharing import agreed


@dataclass(frozen=True)
class Event:
    """What an inner loop, or one update with a hypergradient, left to look at.

    Attributes:
        level: the level's name.
        costs: its costs, as the optimizer saw them.
        params: a 0-d flag: whether its parameters are finite afterwards; None where nothing was updated.
        gradient: a 0-d flag: whether its hypergradient is finite; None for a loop without one.
        stats: the best responses' stats, by lower level.
    """

    level: str
    costs: Sequence[Tensor]
    params: Tensor | None
    gradient: Tensor | None = None
    stats: Mapping[str, Any] | None = None


def check(events: Sequence[Event], levels: Mapping[str, Any], apart: bool = False) -> None:
    """Raise at the first thing that is not finite.

    Args:
        events: what happened, in order.
        levels: the levels by name, for their loss scales.
        apart: whether processes have events of their own; then all raise where one does.

    Raises:
        NonFiniteError: a cost, a level's parameters or a hypergradient is infinite or NaN; the message says which, where,
            and what to try.
    """
    if not apart:
        _check(events, levels)
        return
    found: NonFiniteError | None = None
    try:
        _check(events, levels)
    except NonFiniteError as error:
        found = error
    if not agreed(found is None):
        raise found or NonFiniteError("the tasks of another process are no longer finite; it says which.")


def _check(events: Sequence[Event], levels: Mapping[str, Any]) -> None:
    for event in events:
        name, costs = event.level, event.costs
        if costs and not bool(torch.isfinite(torch.stack(list(costs))).all()):
            t, cost = next((t, float(cost)) for t, cost in enumerate(costs) if not torch.isfinite(cost))
            if event.gradient is None:
                _refuse(
                    f"level '{name}': its cost is {cost} at inner step {t + 1} of {len(costs)}; lower its learning "
                    f"rate or look at its batch.{_scales(levels, [name])}"
                )
            _refuse(f"level '{name}': its cost is {cost}; look at its batch and its parameters.")
        if event.gradient is not None and not bool(event.gradient):
            _refuse(
                f"level '{name}': its hypergradient is not finite although its cost is; the best responses' stats: "
                f"{dict(event.stats or {})}.{_scales(levels, [name, *(event.stats or {})])}"
            )
        if event.params is not None and not bool(event.params):
            if event.gradient is not None:
                _refuse(
                    f"level '{name}': its parameters are no longer finite after its update; lower its learning rate."
                    f"{_scales(levels, [name])}"
                )
            _refuse(
                f"level '{name}': its parameters are no longer finite after {len(costs)} inner steps; lower its "
                f"learning rate, or look for a gradient that is infinite where the cost is not.{_scales(levels, [name])}"
            )


def _scales(levels: Mapping[str, Any], names: Sequence[str]) -> str:
    """What to say of loss scales, under which a gradient may have left its dtype's range."""
    scales = {name: levels[name].loss_scale for name in names if levels[name].loss_scale}
    if not scales:
        return ""
    told = ", ".join(f"loss_scale={scale:g} of level '{name}'" for name, scale in scales.items())
    return f" Or lower {told}, under which a gradient may have left its dtype's range."


def _refuse(message: str) -> None:
    raise NonFiniteError(f"{message} The state that came in is still good.")
