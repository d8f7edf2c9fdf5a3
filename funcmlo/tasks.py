"""Independent copies of a problem, one for each task, evaluated together.

A task level's costs are written for one task; its trees lead with the task axis. What reads a task level is evaluated once
for each task too, and its costs are reduced. All at once (`torch.func.vmap`), in chunks, or one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.chunks import Measured
from funcmlo.errors import BatchError, EstimatorError, FuncmloError

Randomness = Literal["different", "same"]
Reduce: TypeAlias = Literal["mean", "sum"] | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Shared:
    """A batch, or a part of one, that all tasks see as it is: it has no task axis.

    Args:
        batch: any tree.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x, batch: (y - x * batch) ** 2 / 2, torchopt.sgd(1.0), tasks=2, init=lambda x: x),
        ...     fm.Level("x", lambda x, y: y**2, torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"x": torch.ones(())})
        >>> state, _ = program.step(state, {"y": torch.tensor([1.0, 2.0])})
        >>> state.params["y"]
        tensor([1., 2.])
        >>> state, _ = program.step(program.init({"x": torch.ones(())}), {"y": fm.Shared(torch.tensor(3.0))})
        >>> state.params["y"]
        tensor([3., 3.])
    """

    batch: Any


def per_task(tree: Tree, tasks: int) -> Tree:
    """Return copies of a tree for each task, stacked along a new first axis: what a task level's state is made of.

    Args:
        tree: a tree of tensors, such as a network's parameters or buffers.
        tasks: their number n.

    Returns:
        The tree with (n, …) in place of (…).

    Example:
        >>> import torch
        >>> per_task({"w": torch.zeros(3)}, 2)["w"].shape
        torch.Size([2, 3])
    """
    return _tree.map(lambda x: x.expand(tasks, *x.shape).clone(), tree)


@dataclass(frozen=True)
class Slice:
    """The part of what is stacked that one evaluation sees: a task, or one lane of a map over several.

    Attributes:
        first: the number of the task, or of the first one that is mapped together with it.
        of: x ↦ its part.
    """

    first: int
    of: Callable[[Tensor], Tensor]

    def __call__(self, tree: Tree) -> Tree:
        """Return the part of every tensor of a tree; other leaves are constants."""
        return _tree.map_tensors(self.of, tree)


@dataclass(frozen=True)
class Tasks:
    """What a level has to do with tasks.

    Attributes:
        n: their number.
        own: whether the level itself has them; else its cost reads a level that has.
        sources: what of the level's reads leads with the task axis: names of levels and buffers.
        chunk: how many are evaluated together; None for all, 1 for one after the other, without a map; or what measures it.
        randomness: whether tasks that are mapped together draw different numbers or the same; or must not draw.
        reduce: what becomes of the tasks' costs, where the level itself has none.
        first: the number of the first of them, where another process has those before.
        everywhere: how many all processes have together; None for n.
        called: what they are called in messages.
    """

    n: int
    own: bool
    sources: frozenset[str]
    chunk: int | Measured | None = None
    randomness: Literal["different", "same", "error"] = "different"
    reduce: Reduce = "mean"
    first: int = 0
    everywhere: int | None = None
    called: str = "tasks"

    @property
    def at_once(self) -> int:
        """How many are evaluated together."""
        chunk = self.chunk.latest if isinstance(self.chunk, Measured) else self.chunk
        return self.n if chunk is None else chunk

    def mine(self, tree: Tree, everything: int) -> Tree:
        """Return this process's tasks out of a tree whose tensors lead with all of them; others stay as they are."""
        own = slice(self.first, self.first + self.n)
        return _tree.map_tensors(lambda x: x[own] if x.dim() and x.shape[0] == everything else x, tree)

    def map(self, function: Callable[[Slice], tuple[Tree, Tree]]) -> tuple[Tree, Tree]:
        """Evaluate a function for every task.

        Args:
            function: `function(part)` → two trees; what they hold besides tensors is the same for all tasks.

        Returns:
            The first trees stacked along a new first axis, and the second ones added up.
        """
        chunk = self.at_once
        stacks: list[list[Tensor]] = []
        total: list[Tensor] = []
        rebuild: list[Callable[[list[Tensor]], Tree]] = []

        def evaluate(part: Slice) -> tuple[list[Tensor], list[Tensor]]:
            stacked, added = function(part)
            tensors, whole = _tree.partition(stacked)
            summands, whole_sum = _tree.partition(added)
            rebuild[:] = [whole, whole_sum]
            return tensors, summands

        for first in range(0, self.n, chunk):
            if chunk == 1:
                tensors, summands = evaluate(Slice(first, lambda x, i=first: x[i]))  # type: ignore[misc]
                tensors = [x.unsqueeze(0) for x in tensors]
            else:
                tensors, summands = self._together(evaluate, first, min(first + chunk, self.n))
            stacks.append(tensors)
            total = [a + b for a, b in zip(total, summands, strict=True)] if total else summands
        joined = stacks[0] if len(stacks) == 1 else [torch.cat(parts) for parts in zip(*stacks, strict=True)]
        return rebuild[0](joined), rebuild[1](total)

    def _together(
        self, evaluate: Callable[[Slice], tuple[list[Tensor], list[Tensor]]], first: int, last: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        def lane(task: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            del task  # a map wants an operand; the parts are taken where they are needed
            as_lane = _tracing.lanes()
            return evaluate(Slice(first, lambda x: as_lane(x, slice(first, last))))

        try:
            tensors, summands = torch.func.vmap(lane, randomness=self.randomness)(torch.arange(first, last))
        except RuntimeError as error:
            if isinstance(error, FuncmloError):
                raise
            raise EstimatorError(
                f"the {self.called} cannot be evaluated together by torch.func.vmap ({str(error).splitlines()[0][:200]}); "
                "take chunk=1, which makes one after the other, or look at the loss if the same is said there."
            ) from error
        return tensors, [x.sum(0) for x in summands]

    def lane(self, part: Slice) -> int:
        """Return what sets a part's draws apart: 0 for the first one, and for all where tasks draw the same."""
        return part.first + self.first if self.randomness == "different" else 0

    def values(self, function: Callable[[Slice], Tree]) -> Tree:
        """Evaluate a function for every task and stack what it returns."""
        return self.map(lambda part: (function(part), ()))[0]

    def inputs(self, inputs: dict[str, Tree], part: Slice) -> dict[str, Tree]:
        """Return what of a level's inputs one task sees."""
        return {name: part(tree) if name in self.sources else tree for name, tree in inputs.items()}

    def batch(self, level: str, batch: Any, part: Slice) -> Any:
        """Return what of a batch one task sees.

        Args:
            level: whose batch it is, for messages.
            batch: any tree, whose tensors lead with the task axis, or are inside of `Shared`.
            part: the task.

        Returns:
            The task's batch.

        Raises:
            BatchError: a tensor does not lead with the task axis.
        """

        def taken(leaf: Any) -> Any:
            if isinstance(leaf, Shared):
                return leaf.batch
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.dim() and leaf.shape[0] == self.everywhere != self.n:
                leaf = leaf[self.first : self.first + self.n]
            if not leaf.dim() or leaf.shape[0] != self.n:
                also = f" (or ({self.everywhere}, …), those of all processes)" if self.everywhere else ""
                raise BatchError(
                    f"level '{level}': a tensor of its batch has shape {tuple(leaf.shape)}; expected ({self.n}, …){also}, a "
                    f"batch for each of {self.n} {self.called}, or fm.Shared(batch) for one that all of them see."
                )
            return part.of(leaf)

        return _tree.map(taken, batch)

    def reduced(self, costs: Tensor, sign: float) -> Tensor:
        """Return one cost for all tasks.

        Args:
            costs: shape (n,), as they are minimized.
            sign: −1 where these are the negatives of what the loss returned.

        Returns:
            A 0-d tensor: for a task level the sum, whose gradient is every task's own.

        Raises:
            LossError: a function of the user's did not return a scalar.
        """
        if self.own or self.reduce == "sum":
            return costs.sum()
        if self.reduce == "mean":
            return costs.mean()
        assert callable(self.reduce)
        return sign * self.reduce(sign * costs)
