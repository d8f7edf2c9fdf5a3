"""joblib's Dask backend, with an answer for the cells whose worker died."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from joblib._dask import DaskDistributedBackend

from paper_repro.pools import Done, Failure, SweepError, Task

try:
    from distributed import Client
except ImportError as missing:
    raise SweepError(f"A Dask cluster needs dask.distributed ({missing}): pip install 'funcmlo[dask]'.") from missing


class Workers(DaskDistributedBackend):  # type: ignore[misc]
    """The workers of the current Dask client.

    joblib 1.6 calls nobody back when Dask gives a task up, so that a sweep would wait for ever: here the cell comes back
    as a failed one.
    """

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Return the workers' threads, at least 2: joblib runs the cells here, and not there, if one is said."""
        return max(2, int(super().effective_n_jobs(n_jobs)))

    def submit(self, func: Any, callback: Callable[[Any], None] | None = None) -> Any:
        """Submit a batch of one task, and call back whatever becomes of it."""
        ((_, (task,), _),) = func.items

        def ended(future: Future[Any]) -> None:
            error = future.exception()
            if error is not None and callback is not None:
                callback(_lost(task, error))

        def answered(out: Any) -> None:
            if callback is not None:
                callback(_lost(task, out) if isinstance(out, BaseException) else out)

        future: Future[Any] = super().submit(func, answered)
        future.add_done_callback(ended)
        return future


def _lost(task: Task, error: BaseException) -> list[Done]:
    text = f"Dask gave it up: {error}"
    return [Done(task.key, failure=Failure(task.cell, type(error).__name__, text))]


def connect(address: str) -> Any:
    """Connect to a scheduler, and make it what `cluster` uses.

    Args:
        address: of the scheduler, such as `scheduler:8786`.

    Returns:
        The client, a context manager.

    Raises:
        SweepError: nobody answers there.
    """
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise SweepError(f"No Dask scheduler answers at '{address}' ({error}). Start one: dask scheduler.") from error
