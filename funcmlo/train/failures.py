"""What becomes of a run that fails: the error says where it stood, and carries what it had reached."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from funcmlo.errors import OutOfMemoryError
from funcmlo.sharing import who
from funcmlo.state import State


@contextmanager
def terminable(interrupt: Callable[[], None] | None = None) -> Generator[Callable[[], None]]:
    """Run a block that SIGTERM ends as an error does: what a cluster sends before it takes a machine away.

    Args:
        interrupt: what a first Ctrl-C does in place of a KeyboardInterrupt; None for that.

    Yields:
        A function that lets SIGTERM wait for the block's end, while what was reached is brought to safety.
    """

    def end(number: int, frame: Any) -> None:
        raise SystemExit("the run was told to end (SIGTERM)")

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def handle(handler: Any) -> None:
        if ours:
            signal.signal(signal.SIGTERM, handler)

    def ask(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert interrupt is not None
        interrupt()

    asks = interrupt is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    handle(end)
    if asks and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: handle(signal.SIG_IGN)
    finally:
        handle(signal.SIG_DFL)
        if signal.getsignal(signal.SIGINT) is ask:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def announce(error: BaseException) -> None:
    """Say at once what ended a process that works with others: torchrun may end it before it can show its traceback."""
    rank, size = who()
    if size > 1:
        print(f"[process {rank} of {size}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)


def clear(error: BaseException, step: int) -> BaseException:
    """Return an error that says what happened: one of torch's about memory is made one of the package's.

    Args:
        error: what was raised.
        step: the outer step in which it was.

    Returns:
        The error itself, or one in its place.
    """
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    wanting = isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or wanting:
        return OutOfMemoryError(
            f"step {step} ran out of memory ({text}); take smaller batches or run(accumulate=…), ITD(memory='recompute') or "
            "AID in place of ITD, Hessian(products='recompute'), or chunk= of a level with tasks."
        )
    return error


def hand_over(error: BaseException, state: State, history: Any, step: int, where: str) -> None:
    """Put what a run reached onto the error that ends it: its `state` and its `history`.

    Args:
        error: the error.
        state: the last good state.
        history: the rows up to it.
        step: the outer steps made.
        where: where that is saved, for the note; empty for nowhere.
    """
    if isinstance(error, SystemExit):
        error.code = f"{error.code} after {step} steps{where}"
        return
    try:
        error.state, error.history = state, history  # type: ignore[attr-defined]
    except AttributeError:  # of an exception with slots
        return
    if sys.version_info >= (3, 11):
        error.add_note(f"The run made {step} steps; the state after them is this error's .state{where}.")
