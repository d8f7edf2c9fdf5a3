"""The end of every optimizer: −lr times a direction, with a rate that may depend on the step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, check, spread
from funcmlo.optim.schedules import exact
from funcmlo.optim.transformation import Mended, cast, counter, stateless


class ScheduleState(NamedTuple):
    """The number of steps made."""

    step: Tensor


def descend(optimizer: str, lr: Hyperparameter | Callable[[Tensor], Hyperparameter]) -> Mended:
    """Return u = −lr d.

    Args:
        optimizer: whose rate it is, for messages.
        lr: the rate, or a function of the step's number.

    Returns:
        The transformation.

    Raises:
        DefinitionError: lr is no hyperparameter.
    """
    if not callable(lr):
        check(optimizer, "lr", lr)
        return scale(_tree.map(operator.neg, lr))

    schedule = exact(lr)

    def rate(t: Tensor) -> Hyperparameter:
        value = schedule(t)
        check(optimizer, "lr(t)", value)
        return _tree.map(operator.neg, value)

    return scale_by_schedule(rate)


def scale(factor: Hyperparameter) -> Mended:
    """Return u = factor · g."""
    return stateless(lambda updates, params: _scaled(factor, updates))


def scale_by_schedule(schedule: Callable[[Tensor], Hyperparameter]) -> Mended:
    """Return u = schedule(t) · g, with t = 0 at the first step."""

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        return _scaled(schedule(state.step), updates), ScheduleState(state.step + 1)

    return Mended(lambda params: ScheduleState(counter(params)), update)


def _scaled(factor: Hyperparameter, updates: Tree) -> Tree:
    leaves, structure = _tree.flatten(updates)
    factors = spread(factor, updates, "lr")
    return _tree.unflatten(structure, [cast(g * s, g) for g, s in zip(leaves, factors, strict=False)])
