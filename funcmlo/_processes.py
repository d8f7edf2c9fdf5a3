"""Joining the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import BatchError, ProcessError
from funcmlo.sharing import part, who


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        rank: its number, from 0.
        size: how many there are; 1 alone.
        device: where its tensors belong: a GPU of its own where there is one, else the CPU.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all: rank 0."""
        return self.rank == 0

    def share(self, batch: Tree) -> Tree:
        """Return this process's part of a batch.

        Args:
            batch: any tree; tensors with a first axis of (n, …) become (n_r, …), consecutive ones, Σ_r n_r = n.

        Returns:
            The part; alone, all of it.

        Raises:
            BatchError: there are fewer examples than processes.

        Example:
            >>> import torch
            >>> Processes(1, 2, torch.device("cpu")).share({"x": torch.arange(5), "name": "a"})
            {'x': tensor([3, 4]), 'name': 'a'}
        """

        def own(x: torch.Tensor) -> torch.Tensor:
            if x.dim() and x.shape[0] < self.size:
                raise BatchError(
                    f"a batch of shape {tuple(x.shape)} cannot be shared by {self.size} processes; take larger batches."
                )
            return x[part(x.shape[0], self.rank, self.size)] if x.dim() else x

        return _tree.map_tensors(own, batch)


def _join(backend: str | None, timeout: timedelta) -> None:
    """Set up the process group."""
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # After a restart torchrun's store still has the addresses of processes that are gone: each start has names of its own.
    start = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=start, rank=rank, world_size=size, timeout=timeout)


@contextmanager
def processes(*, backend: str | None = None, timeout: float = 600.0) -> Generator[Processes]:
    """Join the processes that torchrun started; a script that it did not start works alone.

    Args:
        backend: as for `torch.distributed.init_process_group`; None takes gloo for tensors on CPUs and NCCL for
            those on GPUs.
        timeout: seconds after which a process that waits for the others gives up.

    Yields:
        This process among them.

    Raises:
        ProcessError: the others cannot be reached.

    Example:
        The same script runs by `python train.py` and by `torchrun --nproc-per-node 2 train.py`:

        >>> import funcmlo as fm
        >>> with fm.processes() as mine:
        ...     print(f"process {mine.rank} of {mine.size}")
        process 0 of 1
    """
    joined = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ and not dist.is_initialized():
        try:
            _join(backend, timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"process {os.environ.get('RANK', '?')} of {os.environ['WORLD_SIZE']} cannot join the others "
                f"({str(error).splitlines()[0][:200]}); start the script by torchrun, which sets what they need to meet."
            ) from error
        joined = True
    try:
        yield Processes(*who(), device)
    finally:
        if joined and dist.is_initialized():
            dist.destroy_process_group()
