"""Sweeps: one function on many cells, in parallel, kept on disk as they finish, and gone on with after a kill."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from funcmlo.errors import DefinitionError
from paper_repro.cells import Cells, DamagedError, digest, written
from paper_repro.pools import Done, Failure, Pool, SweepError, Task, alone, cluster, processes

__all__ = ["Failure", "SweepError", "grid", "share", "sweep"]

Cell = Mapping[str, Any]


def grid(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Return all combinations of values, the last axis first.

    Args:
        axes: the values of each argument.

    Returns:
        The cells of a sweep.

    Example:
        >>> grid(seed=range(2), method=["itd", "cg"])[:3]
        [{'seed': 0, 'method': 'itd'}, {'seed': 0, 'method': 'cg'}, {'seed': 1, 'method': 'itd'}]
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def share(jobs: int = 1) -> int:
    """Return how many of torch's threads each of several processes has, at least one."""
    return max(1, torch.get_num_threads() // jobs)


def sweep(
    function: Callable[..., Any],
    cells: Iterable[Cell],
    *,
    jobs: int = 1,
    backend: Literal["dask"] | None = None,
    out: Path | str | None = None,
    fresh: bool = False,
    threads: int | Callable[[Cell], int] | None = None,
    version: Any = None,
    tell: Callable[[str], None] | None = print,
    label: Callable[[Cell], str] | None = None,
    line: Callable[[Any], str] | None = None,
) -> list[Any]:
    """Call a function on every cell, in parallel, and keep what is finished.

    Each call has its own threads, and random numbers seeded by its cell; so the results are the same to the bit however many
    run at a time, on machines of one kind. A cell that fails does not stop the others.

    Args:
        function: takes a cell's values by name; returns numbers, texts, None, tensors, and lists, tuples and dicts of these.
            Kept results are found again by its name, its cell, the threads and the version, not by its code.
        cells: the values, as `grid` makes them: numbers, texts, None, and dataclasses, lists and mappings of these.
        jobs: how many cells run at a time, each in a process of its own; 1 runs them in this process.
        backend: "dask" for the workers of the current `distributed.Client`, in place of `jobs`.
        out: where finished cells are kept, in `cells/`; a later sweep takes those that are there. None keeps none.
        fresh: whether to begin anew where `out` has cells of this sweep.
        threads: that torch uses in a cell, or a function from the cell to it; None for `share(jobs)`, and 1 on a cluster.
        version: what else the results depend on, such as the function's version; a part of the cells' keys.
        tell: takes a line for each cell that is finished; None for silence.
        label: how a line names a cell; None for its values.
        line: what a line says of a result; None for nothing.

    Returns:
        The results in the cells' order.

    Raises:
        DefinitionError: `jobs`, `backend`, `threads` or a cell has no meaning.
        SweepError: cells failed (after all others were run), or no process or cluster could run them.
        OSError: `out` cannot be written.

    Example:
        >>> def area(width, height):
        ...     return width * height
        >>> sweep(area, grid(width=[1, 2], height=[3, 4]), tell=None)
        [3, 4, 6, 8]
    """
    if not isinstance(jobs, int) or jobs < 1 or backend not in {None, "dask"} or (backend and jobs > 1):
        raise DefinitionError(
            f"jobs={jobs!r} with backend={backend!r} came; expected jobs of at least 1 without a backend, or backend='dask' "
            "alone, where the cluster's workers say how many run at a time."
        )
    default = 1 if backend else share(jobs)
    named = _identity(function, kept=out is not None)
    tasks = []
    for cell in cells:
        used = default if threads is None else threads(cell) if callable(threads) else threads
        if not isinstance(used, int) or used < 1:
            raise DefinitionError(f"threads={used!r} came for a cell; expected an integer of at least 1.")
        key = written({"function": named, "cell": cell, "threads": used, "version": version})
        tasks.append(Task(key, function, cell, used, seed=int(digest(written(cell))[:8], 16)))
    told = Told(len({task.key for task in tasks}), tell or (lambda text: None), label or _words, line)
    kept = Cells(Path(out) / "cells") if out is not None else None
    found = _found(kept, tasks, fresh, told)
    left = {task.key: task for task in tasks if task.key not in found}
    failures = _run(left, _pool(backend, jobs), kept, found, told) if left else []
    if failures:
        lines = [f"{len(failures)} of {told.total} cells failed:"]
        lines += [f"  {told.label(failure.cell)}: {failure.type}: {failure.text}" for failure in failures]
        if kept is not None:
            lines.append(f"The others are kept in {kept.folder}; the same sweep runs only these again.")
        raise SweepError("\n".join(lines), failures, [found.get(task.key) for task in tasks])
    return [found[task.key] for task in tasks]


@dataclass(frozen=True)
class Told:
    """How a sweep says what it does.

    Attributes:
        total: the number of cells.
        tell: takes a line.
        label: names a cell.
        line: says what came out; None for nothing.
    """

    total: int
    tell: Callable[[str], None]
    label: Callable[[Cell], str]
    line: Callable[[Any], str] | None

    def done(self, count: int, cell: Cell, done: Done) -> None:
        """Tell of a cell that was run, the count-th."""
        if done.failure is not None:
            said = f": failed, {done.failure.type}: {done.failure.text}"
        else:
            said = f": {self.line(done.result)}" if self.line else ""
        self.tell(f"[{count}/{self.total}] {self.label(cell)}{said}")


def _words(cell: Cell) -> str:
    return ", ".join(f"{name}={value}" for name, value in cell.items())


def _identity(function: Any, *, kept: bool) -> Any:
    """Return what stands for a function in the keys of its results."""
    if isinstance(function, partial):
        return [_identity(function.func, kept=kept), function.args, function.keywords]
    name = getattr(function, "__qualname__", None)
    if kept and (name is None or "<lambda>" in name):
        raise DefinitionError(
            f"{function!r} came; expected a function with a name (or a functools.partial of one), by which the results in "
            "`out` are found again. Define it by `def`."
        )
    return f"{getattr(function, '__module__', None)}.{name}"


def _found(kept: Cells | None, tasks: Sequence[Task], fresh: bool, told: Told) -> dict[str, Any]:
    """Return what is there already; with fresh, remove it."""
    found: dict[str, Any] = {}
    if kept is None:
        return found
    kept.folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        if fresh:
            kept.path(task.key).unlink(missing_ok=True)
            continue
        try:
            found[task.key] = kept.read(task.key)
        except FileNotFoundError:
            pass
        except DamagedError as damaged:
            told.tell(f"{damaged}; the cell runs again")
    if found:
        told.tell(f"{len(found)} of {told.total} cells are in {kept.folder} already")
    return found


def _pool(backend: str | None, jobs: int) -> Pool:
    if backend:
        return cluster
    return alone if jobs == 1 else partial(processes, jobs=jobs)


def _run(tasks: Mapping[str, Task], pool: Pool, kept: Cells | None, found: dict[str, Any], told: Told) -> list[Failure]:
    """Run tasks by their keys, into `found` and the folder; return what failed."""
    failures: list[Failure] = []
    with closing(pool(list(tasks.values()))) as arriving:
        while True:
            try:
                done = next(arriving)
            except StopIteration:
                return failures
            except SweepError:
                raise
            except Exception as error:
                raise SweepError(f"The cells cannot be run there ({type(error).__name__}): {error}") from error
            if done.failure is not None:
                failures.append(done.failure)
            else:
                if kept is not None:
                    kept.write(done.key, done.result)
                found[done.key] = done.result
            told.done(len(found) + len(failures), tasks[done.key].cell, done)
