"""Answers that are not to be differentiated again, and say so."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError


def once(name: str, answer: Tree, operands: Tree) -> Tree:
    """Return an answer whose derivative is refused.

    Args:
        name: who answers, for the message.
        answer: a tree of tensors; it may be cut from the graph.
        operands: what the answer depends on.

    Returns:
        The same values. Whoever differentiates them by what the operands come from meets an error instead of a zero.
    """
    if not _tracing.recording(answer, operands):
        return answer
    values, structure = _tree.flatten(answer)
    return _tree.unflatten(structure, _Once.apply(name, len(values), *values, *_tree.leaves(operands)))  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """The identity of the first tensors, whose derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        del name
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> NoReturn:
        del cotangents
        raise EstimatorError(
            f"{ctx.name} cannot be differentiated again (its claims say differentiable=False), and something asks for that: "
            "use AID(CG(…)) or ITD() at this level, or composition='paths'."
        )
