"""What processes share of a program: batches, tasks or samples; everything else they hold alike, to the bit.

Each process evaluates its own part of a cost, C = Σ_r (n_r / Σ_r n_r) C_r, n_r its examples or tasks, and C is what every
process sees: differentiated, it is the cost of the union, whoever differentiates it and however often.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from funcmlo import _collectives, _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, LossError, ProcessError

Parallel = Literal["data", "tasks", "samples"]

_apart: ContextVar[bool] = ContextVar("apart", default=False)


@dataclass(frozen=True)
class Sharing:
    """What the processes share of one level.

    Attributes:
        kind: batches, tasks or samples.
        rank: this process's number.
        size: the number of processes.
        local: what of the level's reads is each process's own: the names of levels with tasks and of their buffers.
        sums: whether the costs of the processes are added up, in place of their mean.
        parts: whether each process evaluates a part of the cost; else each evaluates its own (of its tasks), or all of it.
    """

    kind: Parallel
    rank: int
    size: int
    local: frozenset[str] = frozenset()
    sums: bool = False
    parts: bool = True

    def spread(self, params: Tree) -> Tree:
        """Return parameters that all processes hold, where each process evaluates its own part of a cost of them."""
        return params if _apart.get() else _collectives.spread(params)

    def spread_inputs(self, inputs: Mapping[str, Tree]) -> dict[str, Tree]:
        """Return a level's inputs likewise; those that are the process's own stay so."""
        return {name: tree if name in self.local else self.spread(tree) for name, tree in inputs.items()}

    def mean(self, cost: Tensor, extent: int) -> Tensor:
        """Return the cost of all processes' parts together.

        Args:
            cost: this process's, a 0-d tensor.
            extent: the number n_r of examples, or tasks, that it is the mean over.

        Returns:
            Σ_r n_r C_r / Σ_r n_r, or Σ_r C_r.
        """
        if _apart.get():
            return cost
        if self.sums:
            summed: Tensor = _collectives.total(cost)
            return summed
        wide = torch.promote_types(cost.dtype, torch.float32)  # many examples are beyond half precision
        n = torch.full((), float(extent), dtype=wide, device=cost.device)
        weighted, all_n = _collectives.total((cost.to(wide) * n, n))
        mean: Tensor = weighted / all_n.detach()  # a constant, of which no derivative is exchanged
        return mean.to(cost.dtype)

    @property
    def joint(self) -> bool:
        """Whether each process's cost is a part, and what is put together now is that of all."""
        return self.parts and not _apart.get()

    def tied(self, cost: Tensor, to: Tree) -> Tensor:
        """Return a cost that depends on a tree, with zero derivatives of all orders in what it did not depend on.

        So every process exchanges the same derivatives, also one whose examples happen not to touch a parameter.
        """
        if _apart.get():
            return cost
        leaves = [x for x in _tree.leaves(to) if isinstance(x, Tensor)]
        return cost + _collectives.nothing(cost, leaves) if leaves else cost

    def total(self, tree: Tree) -> Tree:
        """Return the sum over processes of a tree that is each one's own."""
        return tree if _apart.get() else _collectives.total(tree)

    def averaged(self, tree: Tree, extent: int) -> Tree:
        """Return the mean over processes of a tree's floating-point tensors, weighted as `mean`; others are process 0's.

        Args:
            tree: plain values.
            extent: as for `mean`.

        Returns:
            A tree that all processes hold.
        """
        values, whole = _tree.floating(tree)
        if values:
            n = torch.full((), float(extent), dtype=torch.float64, device=values[0].device)
            *sums, all_n = _collectives.total([*(x * n.to(x.device, x.dtype) for x in values), n])
            values = [x / all_n.to(x.device, x.dtype) for x in sums]
        averaged = whole(values)
        others = [x for x in _tree.leaves(averaged) if isinstance(x, Tensor) and not x.is_floating_point()]
        if others:
            first = iter(_collectives.from_first(others))
            averaged = _tree.map_tensors(lambda x: x if x.is_floating_point() else next(first), averaged)
        return averaged

    def mean_metrics(self, aux: Mapping[str, Any], extent: int, owner: str) -> dict[str, Any]:
        """Return a loss's metrics with numbers averaged over the processes; other things are this process's.

        Args:
            aux: numbers, tensors, anything.
            extent: as for `mean`.
            owner: whose they are, for the message.

        Returns:
            The metrics.

        Raises:
            LossError: the processes have different ones.
        """
        numbers = {name: x for name, x in aux.items() if _is_number(x)}
        _alike(owner, [(name, isinstance(x, float), str(getattr(x, "dtype", ""))) for name, x in numbers.items()])
        if not numbers:
            return dict(aux)
        tensors = [x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in numbers.values()]
        means = self.averaged(tensors, extent)
        plain = [float(m) if isinstance(x, float) else m for x, m in zip(numbers.values(), means, strict=True)]
        return {**aux, **dict(zip(numbers, plain, strict=True))}

    def gathered(self, aux: Mapping[str, Any], owner: str) -> dict[str, Any]:
        """Return the metrics of tasks, whose tensors lead with the task axis, with those of all processes.

        Args:
            aux: tensors, and what is the same for all tasks.
            owner: whose they are, for the message.

        Returns:
            The metrics.

        Raises:
            LossError: the processes have different ones.
        """
        stacked = {name: x for name, x in aux.items() if isinstance(x, Tensor) and x.dim()}
        _alike(owner, [(name, tuple(x.shape[1:]), str(x.dtype)) for name, x in stacked.items()])
        return {**aux, **_collectives.gathered(stacked)}


def _is_number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, Tensor) and not x.dim() and x.is_floating_point())


def _alike(owner: str, what: Sequence[Any]) -> None:
    """Raise unless all processes return the same kinds of metrics, which else would be exchanged for one another."""
    digest = float(zlib.crc32(repr(what).encode()))
    here = torch.tensor([digest, -digest], dtype=torch.float64)
    (most,) = _collectives.exchanged([here], lambda x: dist.all_reduce(x, dist.ReduceOp.MAX))
    if bool(most.sum()):  # the largest and the least digest
        raise LossError(
            f"{owner}: the processes' losses returned different metrics beside the cost (here {[w[0] for w in what]}); "
            "return the same ones everywhere, NaN where there is nothing to tell."
        )


@contextmanager
def apart() -> Generator[None]:
    """Run a block in which every process sees the cost of its own part; what comes out is averaged by the caller."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def who() -> tuple[int, int]:
    """Return this process's number and how many work together: (0, 1) alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def checked_parallel(parallel: Any) -> Parallel | None:
    """Return what a program's processes share; None where there is one process.

    Args:
        parallel: what the user gave.

    Returns:
        What is shared.

    Raises:
        DefinitionError: it has no meaning, or the processes that torchrun started have not been joined.
    """
    if parallel is not None and parallel not in get_args(Parallel):
        raise DefinitionError(f"parallel={parallel!r}; expected {', '.join(map(repr, get_args(Parallel)))} or None.")
    if parallel is None:
        return None
    if who()[1] == 1 and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DefinitionError(
            f"parallel={parallel!r}: torchrun started {os.environ['WORLD_SIZE']} processes, but they have not been joined; "
            "make and run the program inside of `with fm.processes():`."
        )
    shared: Parallel = parallel
    return shared if who()[1] > 1 else None


def part(n: int, rank: int, size: int) -> slice:
    """Return which of n things are a process's: consecutive ones, as many as any other's or one more.

    Args:
        n: their number.
        rank: the process.
        size: the number of processes.

    Returns:
        The slice.

    Example:
        >>> part(5, 0, 2), part(5, 1, 2)
        (slice(0, 3, None), slice(3, 5, None))
    """
    each, more = divmod(n, size)
    first = rank * each + min(rank, more)
    return slice(first, first + each + (rank < more))


def agreed(good: bool) -> bool:
    """Return whether all processes say so."""
    flag = torch.tensor([float(good)])
    (least,) = _collectives.exchanged([flag], lambda x: dist.all_reduce(x, dist.ReduceOp.MIN))
    return bool(least)


def summed(x: Tensor) -> Tensor:
    """Return the sum over processes of a plain tensor."""
    return _collectives.exchanged([x], lambda flat: dist.all_reduce(flat))[0]


def told_by_all(what: Any) -> list[Any]:
    """Return what every process tells, in the order of their numbers.

    Args:
        what: this process's.

    Returns:
        A list of one from each.

    Raises:
        ProcessError: they cannot be reached.
    """
    found: list[Any] = [None] * who()[1]
    try:
        dist.all_gather_object(found, what)
    except RuntimeError as error:
        raise ProcessError(_collectives.unreachable(error)) from error
    return found
