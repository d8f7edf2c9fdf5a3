"""A tensor's place in the graph without its memory, for what is walked backwards and never read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree

_FEW = 2**14  # entries whose memory is not worth a node of Python in every walk


def weightless(tree: Tree) -> Tree:
    """Return a tree that is differentiated like another one, with large tensors that hold one entry for all.

    A graph's output is read by nobody, but it has the size of the parameters for as long as the graph is walked.

    Args:
        tree: the outputs of a graph that is to be walked.

    Returns:
        The same under a torch.func transform, which does not tell who reads what.
    """
    if _tracing.transforming():
        return tree
    return _tree.map(_place, tree)


def _place(x: Tensor) -> Tensor:
    if type(x) is not Tensor or not x.requires_grad or x.numel() <= _FEW:  # a sharded one has a layout of its own
        return x
    place: Tensor = _Place.apply(x)  # type: ignore[no-untyped-call]
    return place


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.new_zeros(()).expand_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent
