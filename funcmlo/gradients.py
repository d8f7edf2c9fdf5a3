"""The gradient that a level's optimizer gets: of the whole batch at once, or part by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcmlo import _diff, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Microbatches
from funcmlo.evaluation import Evaluation, mean_of
from funcmlo.sharing import apart

_Problem = TypeVar("_Problem", bound=Evaluation)


def value_and_grads(
    problem: _Problem, cost: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Tree], t: int
) -> tuple[Tensor, Any, tuple[Tree, ...], tuple[bool, ...]]:
    """Evaluate a cost and its gradients as `_diff.value_and_grads` does, with the memory of one part of a batch in parts.

    Where the gradients are themselves recorded, to be differentiated again, all parts are in one graph.

    Args:
        problem: the level, bound.
        cost: `cost(problem, *arguments)` → the cost at step t of a problem like this one, and its metrics.
        arguments: trees of tensors.
        t: the step's number within this call.

    Returns:
        As `_diff.value_and_grads`.
    """
    batch = problem.feed(problem.first + t)
    if not isinstance(batch, Microbatches) or torch.is_grad_enabled() or _tracing.transforming():
        return _diff.value_and_grads(partial(cost, problem), arguments)
    sharing = problem.sharing if problem.sharing is not None and problem.sharing.joint else None
    with nullcontext() if sharing is None else apart():
        sums, metrics, reached = _part_by_part(problem, batch, cost, arguments, t)
    if sharing is not None:  # once for all parts, of which processes may have different numbers
        sums = sharing.averaged(sums, problem.extent(t))
    return sums[0], mean_of(metrics, batch.sizes), sums[1], reached


def _part_by_part(
    problem: Evaluation, batch: Microbatches, cost: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Tree], t: int
) -> tuple[Tree, list[dict[str, Any]], tuple[bool, ...]]:
    sums: Tree = None
    metrics, reached = list[dict[str, Any]](), [False] * len(arguments)
    for i in range(len(batch)):
        value, aux, grads, used = _diff.value_and_grads(partial(cost, replace(problem, part=i)), arguments)
        sums = (value, grads) if sums is None else _tree.add(sums, (value, grads))
        reached = [before or now for before, now in zip(reached, used, strict=True)]
        problem = problem.carried(aux)
        metrics.append(aux)
    return sums, metrics, tuple(reached)
