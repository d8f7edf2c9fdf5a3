"""How what an inner step takes is laid out flat, for a tape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.batches import Fixed
from funcmlo.hypergrad.solved import Standing
from funcmlo.problem import Problem
from funcmlo.recording.tape import Kind, kind, same

_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Layout:
    """How what a step takes is laid out flat: what varies from step to step, then what is the same for a loop.

    Attributes:
        standing: the structure of (parameters, optimizer state).
        batch: the structure of the batch, if it varies.
        batch_leaves: its leaves, with what their kind is in place of tensors; None where it does not vary.
        shared: the structure of what is the same for a loop: the inputs, buffers, a batch that does not vary, and the point
            at which products are taken.
        shared_leaves: its leaves, likewise.
        varying: how many tensors standing and batch have.
        fixed: the tensors of what is the same.
    """

    standing: Any
    batch: Any
    batch_leaves: tuple[Any, ...] | None
    shared: Any
    shared_leaves: tuple[Any, ...]
    varying: int
    fixed: tuple[Tensor, ...]

    @staticmethod
    def of(problem: Problem, standing: Tree, inputs: dict[str, Tree], point: Tree = None) -> Layout | None:
        """Return a step's layout, or None where something in it is no plain tensor."""
        batch, varies = problem.feed(problem.first), not isinstance(problem.feed, Fixed)
        own, structure = _tree.flatten(standing)
        some, of_batch = _tree.flatten(batch if varies else None)
        shared, of_shared = _tree.flatten((inputs, dict(problem.fixed), None if varies else batch, point))
        if any(type(x) not in _PLAIN for x in own) or any(
            isinstance(x, Tensor) and type(x) not in _PLAIN for x in (*some, *shared)
        ):
            return None
        fixed = tuple(x for x in shared if isinstance(x, Tensor))
        n = len(own) + sum(isinstance(x, Tensor) for x in some)
        return Layout(structure, of_batch, _kinds(some) if varies else None, of_shared, _kinds(shared), n, fixed)

    def flat(self, problem: Problem, standing: Standing, t: int) -> list[Tensor] | None:
        """Return what varies at a step, or None where its batch is another kind of thing."""
        own = _tree.leaves(standing)
        if self.batch_leaves is None:
            return own
        batch, structure = _tree.flatten(problem.feed(problem.first + t))
        if structure != self.batch or not same(_kinds(batch), self.batch_leaves):
            return None
        return [*own, *(x for x in batch if isinstance(x, Tensor))]

    def whole(self, problem: Problem, tensors: Sequence[Tensor]) -> tuple[Problem, Standing, dict[str, Tree]]:
        """Return the problem with its batch and its buffers, the standing or the point, and the inputs from what is flat."""
        n = self.standing.num_leaves
        standing = _tree.unflatten(self.standing, tensors[:n])
        inputs, fixed, batch, point = _filled(self.shared, self.shared_leaves, tensors[self.varying :])
        if self.batch_leaves is not None:
            batch = _filled(self.batch, self.batch_leaves, tensors[n : self.varying])
        return replace(problem, feed=Fixed(batch), fixed=fixed), standing or point, inputs


def _kinds(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(kind(x) if isinstance(x, Tensor) else x for x in leaves)


def _filled(structure: Any, leaves: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """A tree with tensors in the places of their kinds."""
    rest = iter(tensors)
    return _tree.unflatten(structure, [next(rest) if type(x) is Kind else x for x in leaves])
