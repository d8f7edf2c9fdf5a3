"""A loss as a function of flat lists of tensors, and its derivatives by each way that torch has.

Nothing is shared between two evaluations: each gets copies of everything that it could write to, and the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.probing.remedies import Fault
from funcmlo.signature import BATCH, Call

Vector = list[Tensor]
Pair = tuple[Vector, Vector]
"""What belongs to the parameters, and what belongs to the inputs."""


class NotACost(Exception):  # ruff: ignore[error-suffix-on-exception-name] - it never leaves the package
    """A loss returned something that is no cost."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True)
class Case:
    """A loss with its arguments.

    Attributes:
        call: the loss, and what it reads.
        params: its own parameters.
        inputs: the other arguments by name.
        batch: its batch.
    """

    call: Call
    params: Tree
    inputs: Mapping[str, Tree]
    batch: Any

    def double(self) -> Case:
        """Return the case in float64."""

        def wide(x: Tensor) -> Tensor:
            return x.double() if x.is_floating_point() else x

        params, inputs, batch = (_tree.map_tensors(wide, part) for part in (self.params, dict(self.inputs), self.batch))
        return Case(self.call, params, inputs, batch)

    def point(self) -> Pair:
        """Return copies of the parameters' tensors, and of the inputs' that can be differentiated by."""
        return tuple(  # type: ignore[return-value]
            [x.detach().clone() for x in _tree.floating(tree)[0]] for tree in (self.params, dict(self.inputs))
        )

    def names(self) -> tuple[list[str], list[str]]:
        """Return what messages call the tensors of `point`."""
        own = [f"the parameters{path}" for path, _ in _tree.named_leaves(self.params)]
        inputs = [(name, path, x) for name, tree in self.inputs.items() for path, x in _tree.named_leaves(tree)]
        return own, [f"{n}{path}" for n, path, x in inputs if isinstance(x, Tensor) and x.is_floating_point()]

    def label(self, i: int) -> str:
        """Return what messages call a tensor of `point`, the parameters' counted first."""
        own, inputs = self.names()
        return [*own, *inputs][i]

    def groups(self) -> list[tuple[str, list[int]]]:
        """Return the numbers of `point`'s tensors, those of one argument together, with the argument's name."""
        trees = {"the parameters": self.params, **self.inputs}
        counts = [len(_tree.floating(tree)[0]) for tree in trees.values()]
        firsts = [sum(counts[:k]) for k in range(len(counts))]
        return [(name, list(range(f, f + n))) for name, f, n in zip(trees, firsts, counts, strict=True) if n]

    def arguments(self, y: Sequence[Tensor], x: Sequence[Tensor]) -> tuple[Tree, dict[str, Any], Any]:
        """Return the loss's arguments, fresh copies except for the tensors given."""

        def fresh(tree: Tree) -> Tree:
            return _tree.map_tensors(lambda t: t if t.is_floating_point() else t.clone(), tree)

        params, inputs = _tree.floating(self.params)[1](y), _tree.floating(fresh(dict(self.inputs)))[1](x)
        return params, inputs, _tree.map_tensors(torch.clone, self.batch)

    def value(self, y: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
        """Evaluate the loss.

        Args:
            y: the parameters' tensors.
            x: the inputs' floating-point tensors.

        Returns:
            The cost.
        """
        return self.evaluated(self.arguments(y, x))

    def evaluated(self, arguments: tuple[Tree, dict[str, Any], Any], *, seed: bool = True) -> Tensor:
        """Evaluate the loss at arguments.

        Args:
            arguments: its parameters, its inputs by name, and its batch.
            seed: whether it draws under a seed; else it moves the default generators on.

        Returns:
            The cost.
        """
        params, inputs, batch = arguments
        with _random.seeded(0) if seed else nullcontext():
            return cost_of(self.call(params, values={**inputs, BATCH: batch}))

    def number(self, y: Vector, x: Vector) -> Tensor:
        """Return the cost at a point as a plain number, evaluated as where a gradient is taken."""
        leaves = _leaves(y, x)
        with torch.enable_grad():
            return self.value(leaves[: len(y)], leaves[len(y) :]).detach()

    def grad(self, y: Vector, x: Vector) -> tuple[Vector, Vector, list[bool]]:
        """Return ∇_y, ∇_x by plain autograd, and which tensors the loss depends on at all."""
        leaves = _leaves(y, x)
        with torch.enable_grad():
            value = self.value(leaves[: len(y)], leaves[len(y) :])
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        whole = _filled(grads, leaves)
        return whole[: len(y)], whole[len(y) :], [g is not None for g in grads]

    def hvp(self, y: Vector, x: Vector, v: Vector) -> Pair:
        """Return (∇²_yy v, ∇²_xy v) by plain autograd, reverse over reverse."""
        leaves = _leaves(y, x)
        with torch.enable_grad():
            value = self.value(leaves[: len(y)], leaves[len(y) :])
            grads = torch.autograd.grad(value, leaves[: len(y)], create_graph=True, allow_unused=True)
        live = [(g, w) for g, w in zip(grads, v, strict=True) if g is not None and g.requires_grad]
        if not live:
            return _split([torch.zeros_like(p) for p in leaves], y)
        slopes, cotangents = zip(*live, strict=True)
        return _split(_filled(torch.autograd.grad(slopes, leaves, cotangents, allow_unused=True), leaves), y)

    def func_grad(self, y: Vector, x: Vector) -> Pair:
        """Return (∇_y, ∇_x) by `torch.func.grad`."""
        grads: Pair = torch.func.grad(self.value, argnums=(0, 1))(y, x)
        return grads

    def func_hvp(self, y: Vector, x: Vector, v: Vector) -> Pair:
        """Return (∇²_yy v, ∇²_xy v) by `torch.func.grad` over itself."""

        def product(y: Vector, x: Vector) -> Tensor:
            slopes: Vector = torch.func.grad(self.value)(y, x)
            return torch.stack([(g * w).sum() for g, w in zip(slopes, v, strict=True)]).sum()

        grads: Pair = torch.func.grad(product, argnums=(0, 1))(y, x)
        return grads

    def jvp(self, y: Vector, x: Vector, v: Vector) -> Pair:
        """Return (∇²_yy v, ∇²_xy v) by `torch.func.jvp` over `torch.func.grad`."""
        tangents: Pair = torch.func.jvp(lambda at: self.func_grad(at, x), (y,), (v,))[1]
        return tangents


def cost_of(returned: Any) -> Tensor:
    """Take the cost out of what a loss returned.

    Args:
        returned: a 0-d tensor, or a pair of one and metrics.

    Returns:
        The cost.

    Raises:
        NotACost: it is none.
    """
    value, aux = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(value, Tensor):
        came = "a Python number" if isinstance(value, (int, float)) else type(value).__name__
        raise NotACost(
            Fault(
                f"returned {came}; expected a scalar tensor",
                remedy="return a 0-d tensor, or (0-d tensor, dict of metrics); no .item() or float() on it",
            )
        )
    if value.dim():
        raise NotACost(
            Fault(f"returned shape {tuple(value.shape)}; expected a scalar", remedy="reduce it: .mean() or .sum()")
        )
    if not value.is_floating_point():
        way = "take .real or .abs() of it" if value.is_complex() else "return a real floating-point tensor"
        raise NotACost(Fault(f"returned dtype {value.dtype}; expected a real floating-point scalar", remedy=way))
    if not isinstance(aux, dict):
        came = type(aux).__name__
        raise NotACost(Fault(f"returned {came} beside the cost", remedy="return a dict of metrics there"))
    return value


def _leaves(y: Vector, x: Vector) -> Vector:
    return [t.detach().clone().requires_grad_() for t in (*y, *x)]


def _filled(grads: Sequence[Tensor | None], leaves: Vector) -> Vector:
    return [torch.zeros_like(x) if g is None else g.detach() for g, x in zip(grads, leaves, strict=True)]


def _split(tensors: Vector, y: Vector) -> Pair:
    return tensors[: len(y)], tensors[len(y) :]
