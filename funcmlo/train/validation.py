"""Validation functions of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from funcmlo import sharing
from funcmlo.errors import LossError
from funcmlo.state import State
from funcmlo.train.rows import numbers
from funcmlo.train.settings import Validate


def validated(
    step: int, state: State, functions: Mapping[str, Validate], every: Mapping[str, int], size: int = 1
) -> dict[str, float]:
    """Return what the validation functions that are due say; of several processes, the mean.

    Args:
        step: the outer steps made.
        state: the state after them.
        functions: functions of the state, by name.
        every: the outer steps between two calls of each.
        size: how many processes work together.

    Returns:
        By column: `name` for a function that returns a number, `name/key` for one that returns a dict.

    Raises:
        LossError: a function returned something else.
    """
    found: dict[str, Any] = {}
    for name, function in functions.items():
        if step % every[name]:
            continue
        with torch.no_grad():
            told = function(state)
        answers = {f"{name}/{key}": value for key, value in told.items()} if isinstance(told, Mapping) else {name: told}
        for column, value in answers.items():
            if not isinstance(value, (int, float)) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
                raise LossError(
                    f"run(validate=…): {column} is {type(value).__name__}; expected a function of the state that returns a "
                    "number or a dict of numbers."
                )
        found |= answers
    plain = numbers(found)
    if size > 1 and plain:
        together = sharing.summed(torch.tensor(list(plain.values()), dtype=torch.float64)) / size
        plain = dict(zip(plain, together.tolist(), strict=True))
    return plain
