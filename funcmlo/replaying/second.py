"""Products of a compiled level's second derivatives with vectors, at one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _reached, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Fixed
from funcmlo.problem import Problem
from funcmlo.recording.tape import below_autograd
from funcmlo.replaying.layout import Layout
from funcmlo.replaying.recording import Function, Recording, Tensors, compiles


def products(problem: Problem, params: Tree, inputs: dict[str, Tree], t: int) -> Products | None:
    """Return the products of a compiled level's second derivatives with vectors, at one point.

    Args:
        problem: the level, bound.
        params: y, the point.
        inputs: x.
        t: the step whose batch and randomness are bound.

    Returns:
        v ↦ ∇²_yy g v and v ↦ ∇²_xy g v; None where they are to be taken from the cost as it is written.
    """
    if not compiles(problem) or _tracing.recording(params, inputs):
        return None
    still = replace(problem, feed=Fixed(problem.feed(problem.first + t)), first=problem.first + t)
    layout = Layout.of(still, (), inputs, params)
    if layout is None:
        return None
    vector = _tree.leaves(params)

    def made(function: Function, name: str) -> Callable[[Tree], Sequence[Any]] | None:
        recording = Recording(still, function, layout, name)
        recording.trust((), vector)
        if recording.refused((), vector) or not recording.ready(still, (), vector):
            return None
        assert recording.forward is not None
        with below_autograd():
            _, kept = recording.forward()

        def product(v: Tree) -> Sequence[Any]:
            with below_autograd():
                assert recording.backward is not None
                return recording.backward(kept, *_tree.leaves(v))  # type: ignore[no-any-return]

        return product

    hessian, cross = made(_own_products, "Hessian-vector product"), made(_cross_products, "cross product")
    if hessian is None or cross is None:
        return None
    return Products(hessian, cross, params, inputs)


@dataclass(frozen=True, eq=False)
class Products:
    """Second derivatives' products with vectors at a point."""

    _hessian: Callable[[Tree], Sequence[Any]]
    _cross: Callable[[Tree], Sequence[Any]]
    params: Tree
    inputs: dict[str, Tree]

    def hessian(self, v: Tree) -> Tree:
        """Return ∇²_yy g v."""
        leaves, structure = _tree.flatten(self.params)
        return _tree.unflatten(structure, _materialized(self._hessian(v), leaves))

    def cross(self, v: Tree) -> dict[str, Tree]:
        """Return ∇²_xy g v for every input."""
        leaves, structure = _tree.flatten(self.inputs)
        found = self._cross(v)
        _reached.tell(self.inputs, found)
        answer: dict[str, Tree] = _tree.unflatten(structure, _materialized(found, leaves))
        return answer


def _materialized(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, like, strict=True)]


def _own_products(
    problem: Problem, params: Tree, inputs: dict[str, Tree], vector: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, None]:
    return [], _second(problem, params, inputs, _tree.leaves(params), vector), None


def _cross_products(
    problem: Problem, params: Tree, inputs: dict[str, Tree], vector: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, None]:
    return [], _second(problem, params, inputs, _tree.leaves(inputs), vector), None


def _second(problem: Problem, params: Tree, inputs: dict[str, Tree], by: list[Tensor], vector: Sequence[Tensor]) -> Tensors:
    """∇_by ⟨∇_y g, v⟩."""
    for x in (*_tree.leaves(params), *_tree.leaves(inputs)):
        x.requires_grad_()
    with torch.enable_grad():
        gradient, _, _ = problem.gradient(params, inputs, 0)
    live = [(x, v) for x, v in zip(_tree.leaves(gradient), vector, strict=True) if x.requires_grad]
    if not live:
        return [None] * len(by)
    outputs, vs = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, by, vs, allow_unused=True))
