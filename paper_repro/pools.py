"""Where a sweep's cells run: in this process, in joblib's processes, or on a Dask cluster by joblib's backend."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from funcmlo.errors import FuncmloError
from paper_repro.cells import plain

_ONE_AT_A_TIME = threading.RLock()
"""Random numbers and threads belong to the process, and a Dask worker may have several threads."""


class SweepError(FuncmloError, RuntimeError):
    """A sweep cannot run, or some of its cells failed.

    Attributes:
        failures: the cells that failed.
        results: of all cells, None for those that failed.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = (), results: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)
        self.results = list(results)


@dataclass(frozen=True)
class Failure:
    """A cell without a result.

    Attributes:
        cell: the cell.
        type: the exception's name.
        text: what it says.
        traceback: where it was raised; empty if the process died.
    """

    cell: Mapping[str, Any]
    type: str
    text: str
    traceback: str = ""


@dataclass(frozen=True)
class Task:
    """A cell to run.

    Attributes:
        key: the cell's.
        function: is called with the cell's values by name.
        cell: the values.
        threads: how many torch uses.
        seed: of all random numbers that the function does not seed itself.
    """

    key: str
    function: Callable[..., Any]
    cell: Mapping[str, Any]
    threads: int
    seed: int


@dataclass(frozen=True)
class Done:
    """A cell that was run.

    Attributes:
        key: the cell's.
        result: what the function returned, as plain data.
        failure: why it returned nothing; None if it did.
        seconds: wall seconds.
    """

    key: str
    result: Any = None
    failure: Failure | None = None
    seconds: float = 0.0


Pool = Callable[[Sequence[Task]], Generator[Done, None, None]]


def run(task: Task) -> Done:
    """Run a cell where this is called, with its own threads and random numbers, and give back what it raises."""
    with _ONE_AT_A_TIME, _settled(task.threads, task.seed):
        begin = time.perf_counter()
        try:
            result = plain(task.function(**task.cell))
        except (Exception, SystemExit) as error:
            failure = Failure(task.cell, type(error).__name__, str(error), traceback.format_exc())
            return Done(task.key, failure=failure, seconds=time.perf_counter() - begin)
        return Done(task.key, result, seconds=time.perf_counter() - begin)


@contextmanager
def _settled(threads: int, seed: int) -> Generator[None, None, None]:
    """Make a cell independent of what ran before it in this process, and leave no trace of it."""
    before = torch.get_num_threads(), torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_rng_state(before[1])
        numpy.random.set_state(before[2])
        random.setstate(before[3])


def alone(tasks: Sequence[Task]) -> Generator[Done, None, None]:
    """Run cells one after the other in this process."""
    for task in tasks:
        yield run(task)


def processes(tasks: Sequence[Task], jobs: int) -> Generator[Done, None, None]:
    """Run cells in joblib's processes, and give back each as it is done.

    A process that dies (killed, out of memory) breaks the pool. Tasks start in order, so the first of those that have not
    come back were running; each of them runs once more by itself, which tells the one that kills, and the rest goes on.

    Args:
        tasks: the cells.
        jobs: how many run at a time, at least 2.

    Yields:
        The cells as they finish.
    """
    from joblib.externals.loky.process_executor import BrokenProcessPool

    waiting = {task.key: task for task in tasks}
    while waiting:
        try:
            for done in _loky(list(waiting.values()), jobs):
                del waiting[done.key]
                yield done
        except BrokenProcessPool:
            for task in list(waiting.values())[:jobs]:
                try:
                    (done,) = _loky([task], jobs)
                except BrokenProcessPool as error:
                    text = f"its process died, killed or out of memory: {error}".splitlines()[0]
                    done = Done(task.key, failure=Failure(task.cell, type(error).__name__, text))
                del waiting[done.key]
                yield done


def _loky(tasks: Sequence[Task], jobs: int) -> Generator[Done, None, None]:
    from joblib import Parallel, parallel_config

    with parallel_config("loky", inner_max_num_threads=max(task.threads for task in tasks)):
        parallel = Parallel(jobs, return_as="generator_unordered", batch_size=1, pre_dispatch=jobs)
    yield from _closed(parallel, tasks)


def _closed(parallel: Any, tasks: Sequence[Task]) -> Generator[Done, None, None]:
    """Give back a pool's results, and stop the pool when nobody wants them any more."""
    from joblib import delayed

    arriving = parallel(delayed(run)(task) for task in tasks)
    try:
        yield from arriving
    finally:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")  # that tasks are cancelled is meant
            arriving.close()


def cluster(tasks: Sequence[Task]) -> Generator[Done, None, None]:
    """Run cells on the workers of the current Dask client, by joblib's backend.

    What Dask gives up may have died of another cell on the same worker, so it runs once more when nothing else does.

    Args:
        tasks: the cells.

    Yields:
        The cells as they finish.
    """
    by_key, lost = {task.key: task for task in tasks}, []
    for done in _dask(tasks):
        if done.failure is not None and not done.failure.traceback:
            lost.append(by_key[done.key])
        else:
            yield done
    for task in lost:
        yield from _dask([task])


def _dask(tasks: Sequence[Task]) -> Generator[Done, None, None]:
    from joblib import Parallel

    from paper_repro.dask_backend import Workers

    parallel = Parallel(backend=Workers(), return_as="generator_unordered", batch_size=1, pre_dispatch="all")
    yield from _closed(parallel, tasks)
