"""Checks of the solvers' settings."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from funcmlo.errors import DefinitionError


def check_iterations(owner: str, iterations: int, name: str = "iterations") -> None:
    """Raise unless a number of iterations is an integer of at least one.

    Args:
        owner: the solver's name, for the message.
        iterations: what the user gave.
        name: what it is called.

    Raises:
        DefinitionError: it is not.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or iterations < 1:
        raise DefinitionError(f"{owner}({name}={iterations!r}): expected an integer of at least 1.")


def is_positive(value: Any) -> bool:
    """Say whether something is a positive finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def check_not_negative(owner: str, **settings: float) -> None:
    """Raise unless settings are finite numbers that are not negative.

    Args:
        owner: the solver's name, for the message.
        **settings: what the user gave, by name.

    Raises:
        DefinitionError: one is not.
    """
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise DefinitionError(f"{owner}({name}={value!r}): expected a finite number that is not negative.")


def check_positive(owner: str, **settings: float) -> None:
    """Raise unless settings are finite numbers above zero.

    Args:
        owner: the solver's name, for the message.
        **settings: what the user gave, by name.

    Raises:
        DefinitionError: one is not.
    """
    for name, value in settings.items():
        if not is_positive(value):
            raise DefinitionError(f"{owner}({name}={value!r}): expected a finite number above zero.")


def check_seed(owner: str, seed: int) -> None:
    """Raise unless a seed is an integer that is not negative.

    Args:
        owner: the solver's name, for the message.
        seed: what the user gave.

    Raises:
        DefinitionError: it is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise DefinitionError(f"{owner}(seed={seed!r}): expected an integer that is not negative.")
