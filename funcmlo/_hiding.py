"""While a call is captured as a whole, no value may be looked at: what is captured has to hold for all of them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_HIDDEN: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def hiding() -> Generator[None]:
    """Run a block in which values are not looked at, as if a torch.func transform were active."""
    token = _HIDDEN.set(True)
    try:
        yield
    finally:
        _HIDDEN.reset(token)


def hidden() -> bool:
    """Say whether values are not to be looked at because a call is being captured."""
    return _HIDDEN.get()
