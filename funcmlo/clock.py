"""How long each level of a program takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Clock:
    """Seconds by level, without those of the levels that run inside of it; on a GPU, the time to tell it what to do."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._level: str | None = None
        self._since = 0.0

    def turn(self, level: str | None) -> str | None:
        """Let the time from now on be a level's.

        Args:
            level: its name; None for nobody's.

        Returns:
            Whose it was.
        """
        before, now = self._level, time.perf_counter()
        if before is not None:
            self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._level, self._since = level, now
        return before


def timed(method: _Method) -> _Method:
    """Let the time of a method be that of the level it is called for: of its argument `name`, by `self.clock`."""

    @functools.wraps(method)
    def clocked(self: Any, name: str, *rest: Any) -> Any:
        before = self.clock.turn(name)
        try:
            return method(self, name, *rest)
        finally:
            self.clock.turn(before)

    return clocked  # type: ignore[return-value]
