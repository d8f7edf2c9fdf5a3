"""Callbacks: who is told of a run as it goes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from funcmlo.errors import DefinitionError
from funcmlo.state import State
from funcmlo.train.history import History


@dataclass(frozen=True)
class Start:
    """What a callback is told when a run begins.

    Attributes:
        program: what the program shows of itself.
        levels: the names of its levels, lowest first.
        steps: outer steps in total.
        begun: outer steps made already, where a run goes on.
        seed: the state's seed.
        history: the rows so far.
        settings: what each level shows of itself.
    """

    program: str
    levels: tuple[str, ...]
    steps: int
    begun: int
    seed: int
    history: History
    settings: Mapping[str, str] = field(default_factory=dict)


class Callback:
    """What is told of a run; any object with these three methods will do, and a function of (step, row, state) too.

    Example:
        >>> class Loud(Callback):
        ...     def record(self, step, row, state):
        ...         print(step, sorted(row))
        >>> as_callback(Loud()).record(1, {"x/cost": 0.5}, None)
        1 ['x/cost']
    """

    def begin(self, start: Start) -> None:
        """Hear that the run begins.

        Args:
            start: what there is to know of it.
        """

    def record(self, step: int, row: Mapping[str, float], state: State) -> bool | None:
        """Hear of an outer step.

        Args:
            step: the outer steps made.
            row: its numbers by column.
            state: the state after it, which is not to be kept.

        Returns:
            True to end the run after this step.
        """

    def end(self, state: State, error: BaseException | None) -> None:
        """Hear that the run is over, in any way; called once after each `begin`.

        Args:
            state: the last good state.
            error: what ended the run, if it failed.
        """


class _Function(Callback):
    """A function of (step, row, state)."""

    def __init__(self, function: Callable[[int, Mapping[str, float], State], Any]) -> None:
        self._function = function

    def record(self, step: int, row: Mapping[str, float], state: State) -> bool | None:
        """Call it; only True ends the run."""
        return self._function(step, row, state) is True

    def __str__(self) -> str:
        """Tell its name."""
        return getattr(self._function, "__qualname__", type(self._function).__name__)


def as_callback(given: Any) -> Callback:
    """Return what the user gave as a callback.

    Args:
        given: a callback, or a function of (step, row, state).

    Returns:
        An object with the methods of `Callback`.

    Raises:
        DefinitionError: it is neither, or a class in place of an object.
    """
    methods = [callable(getattr(given, name, None)) for name in ("begin", "record", "end")]
    if isinstance(given, type):
        raise DefinitionError(f"callbacks: the class {given.__name__} came; expected an object of it: {given.__name__}(…).")
    if all(methods):
        callback: Callback = given
        return callback
    if callable(given) and not any(methods):
        return _Function(given)
    raise DefinitionError(
        f"callbacks: {type(given).__name__} came; expected objects with the methods begin, record and end (fm.Callback), or "
        "functions of (step, row, state)."
    )


def check_every(owner: str, every: Any) -> int:
    """Return an interval, or raise.

    Args:
        owner: who takes it, for the message.
        every: what the user gave.

    Returns:
        The interval.

    Raises:
        DefinitionError: it is no positive integer.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise DefinitionError(f"{owner}(every={every!r}): expected an integer of at least 1.")
    return every


def check_package(owner: str, module: str, package: str) -> None:
    """Raise unless a package is installed.

    Args:
        owner: who needs it, for the message.
        module: what is imported.
        package: what is installed.

    Raises:
        DefinitionError: it is absent.
    """
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        raise DefinitionError(f"{owner} needs the package {package}, which is not installed: pip install {package}")
