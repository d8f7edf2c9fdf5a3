"""Sums over processes that can be differentiated to any order, mapped, and taken forward.

A tensor is either replicated (every process holds the same bits of one value) or a process's own. Two linear maps lead from
one to the other, and each is the other's transpose: `Spread` (replicated → own) copies a value to every process, at no cost;
`Total` (own → replicated) adds up what the processes have. So a derivative of any order is made of these two again, and
every product with it is the same on all processes, with one exchange for each reverse pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import ProcessError


class Spread(torch.autograd.Function):
    """x ↦ x, of which every process makes something else; Spreadᵀ = Total."""

    @staticmethod
    def forward(*xs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors."""
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Add up what every process made of it."""
        return Total.apply(*cotangents)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        """Spread the tangents."""
        return tuple(t.view_as(t) for t in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *xs: Tensor) -> tuple[Any, Sequence[int | None]]:
        """Spread what is mapped as it is."""
        return Spread.apply(*xs), tuple(in_dims)  # type: ignore[no-untyped-call]


class Total(torch.autograd.Function):
    """x_r ↦ Σ_r x_r over the processes r; Totalᵀ = Spread."""

    @staticmethod
    def forward(*xs: Tensor) -> tuple[Tensor, ...]:
        """Return the sums."""
        return tuple(exchanged(xs, lambda x: dist.all_reduce(x)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Give the cotangent to every process."""
        return Spread.apply(*cotangents)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Add up the tangents."""
        return Total.apply(*tangents)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *xs: Tensor) -> tuple[Any, Sequence[int | None]]:
        """Add up all that is mapped in one exchange."""
        return Total.apply(*xs), tuple(in_dims)  # type: ignore[no-untyped-call]


class Nothing(torch.autograd.Function):
    """Zeros that depend on tensors: their derivatives are such zeros again."""

    @staticmethod
    def forward(like: Tensor, *xs: Tensor) -> Tensor:
        """Return zeros like the first, in no memory."""
        return like.new_zeros(()).expand(like.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what it depends on."""
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        """Return zeros like each."""
        _, *xs = ctx.saved_tensors
        return None, *(nothing(x, xs) for x in xs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        """Return zeros."""
        like, *xs = ctx.saved_tensors
        return nothing(like, xs)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], like: Tensor, *xs: Tensor) -> tuple[Any, int | None]:
        """Return the zeros of one lane."""
        one = like if in_dims[0] is None else like.select(in_dims[0], 0)
        return nothing(one, xs), None


def nothing(like: Tensor, to: Sequence[Tensor]) -> Tensor:
    """Return zeros like a tensor that depend on others, with zero derivatives of all orders."""
    zeros: Tensor = Nothing.apply(like, *to)  # type: ignore[no-untyped-call]
    return zeros


def spread(tree: Tree) -> Tree:
    """Return a replicated tree as something of which each process makes its own."""
    return _over_tensors(Spread.apply, tree)


def total(tree: Tree) -> Tree:
    """Return the sum over processes of a tree of tensors, in one exchange for each dtype."""
    return _over_tensors(Total.apply, tree)


def exchanged(tensors: Sequence[Tensor], exchange: Callable[[Tensor], Any]) -> list[Tensor]:
    """Return tensors after an exchange in place of their copies, put side by side where device and dtype agree.

    Args:
        tensors: plain tensors.
        exchange: what is done, such as `torch.distributed.all_reduce`, with a vector.

    Returns:
        New tensors of the same shapes.

    Raises:
        ProcessError: the exchange failed.
    """
    if not dist.is_initialized():
        raise ProcessError(
            "the processes are no longer joined: a program with parallel= is used inside of the `with fm.processes():` that "
            "it was made in."
        )
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        kinds.setdefault((x.device, x.dtype), []).append(i)
    answer = list(tensors)
    for numbers in kinds.values():
        parts = [tensors[i].reshape(-1) for i in numbers]
        flat = torch.cat(parts)
        try:
            exchange(flat)
        except RuntimeError as error:
            raise ProcessError(unreachable(error)) from error
        for i, part in zip(numbers, torch.split(flat, [part.numel() for part in parts]), strict=True):
            answer[i] = part.view(tensors[i].shape)
    return answer


def unreachable(error: RuntimeError) -> str:
    """Return what to say when an exchange failed."""
    return (
        f"process {dist.get_rank()} of {dist.get_world_size()} cannot exchange numbers with the others "
        f"({str(error).splitlines()[0][:200]}): one of them is gone, hangs, or went another way. Look for the first error "
        "among their outputs. Checkpoints are safe, and torchrun --max-restarts goes on from them."
    )


def from_first(tree: Tree) -> Tree:
    """Return the tree that process 0 has."""
    return _over_tensors(lambda *xs: exchanged(xs, lambda x: dist.broadcast(x, src=0)), tree)


def gathered(tree: Tree) -> Tree:
    """Return the trees of all processes put together along the first axis of their tensors, in the order of their ranks."""
    sizes = [torch.zeros(dist.get_world_size(), dtype=torch.int64)]
    lengths = [len(x) for x in _tree.partition(tree)[0]]
    if not lengths:
        return tree
    sizes[0][dist.get_rank()] = lengths[0]
    (counts,) = exchanged(sizes, lambda x: dist.all_reduce(x))

    def together(*xs: Tensor) -> list[Tensor]:
        parts = []
        for rank, n in enumerate(counts.tolist()):
            own = [x if rank == dist.get_rank() else x.new_empty((n, *x.shape[1:])) for x in xs]
            parts.append(exchanged(own, lambda x, rank=rank: dist.broadcast(x, src=rank)))  # type: ignore[misc]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    return _over_tensors(together, tree)


def _over_tensors(function: Callable[..., Sequence[Tensor]], tree: Tree) -> Tree:
    tensors, whole = _tree.partition(tree)
    return whole(list(function(*tensors))) if tensors else tree
