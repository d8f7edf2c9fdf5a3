"""Curvature as matrix-free linear operators with stated structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _diff, _tree
from funcmlo._tree import Tree


@dataclass(frozen=True)
class Operator:
    """A square linear map u ↦ Hu on trees.

    Attributes:
        matvec: the product.
        like: a tree of the space that H acts on.
        symmetric: whether H = Hᵀ.
        transpose: u ↦ Hᵀu of an H that is not symmetric, for the solvers that need it; None where it is not known.
        adapt: v ↦ −(∂u/∂g)ᵀ v, what the level's optimizer u(g) makes of a gradient, for `OptimizerIdentity`; None where
            there is no optimizer.
        point: the solved level (`fm.Solved`) that H belongs to, for solvers that build their own curvature; None where
            there is none.
    """

    matvec: Callable[[Tree], Tree]
    like: Tree
    symmetric: bool = True
    transpose: Callable[[Tree], Tree] | None = None
    adapt: Callable[[Tree], Tree] | None = None
    point: Any = None

    def __call__(self, u: Tree) -> Tree:
        """Return Hu."""
        return self.matvec(u)

    def dense(self) -> Tensor:
        """Return H as a matrix, column by column; for small problems and for tests.

        Returns:
            A p × p tensor, the leaves' entries in the tree's order.
        """
        basis = torch.eye(_tree.size(self.like), dtype=_tree.precision(self.like), device=_device(self.like))
        columns = [ravel(self.matvec(unravel(e, self.like))) for e in basis]
        return torch.stack(columns, dim=1) if columns else basis


def ravel(tree: Tree) -> Tensor:
    """Lay a tree out as one vector, in the tree's widest dtype."""
    dtype, device = _tree.precision(tree), _device(tree)
    return torch.cat([
        torch.zeros(0, dtype=dtype, device=device),
        *(x.reshape(-1).to(device, dtype) for x in _tree.leaves(tree)),
    ])


def unravel(vector: Tensor, like: Tree) -> Tree:
    """Put a vector's entries back into a tree's shapes, dtypes and devices."""
    leaves, structure = _tree.flatten(like)
    parts = torch.split(vector, [x.numel() for x in leaves])
    shaped = (p.reshape(x.shape).to(x.device, x.dtype) for p, x in zip(parts, leaves, strict=True))
    return _tree.unflatten(structure, shaped)


def _device(tree: Tree) -> torch.device:
    return next((x.device for x in _tree.leaves(tree)), torch.device("cpu"))


def with_transpose(operator: Operator, body: Callable[[Operator], Tree]) -> Tree:
    """Do something with a linear operator that knows its transpose too.

    Args:
        operator: u ↦ Au, made of pullbacks, so that it can be differentiated by u.
        body: receives the operator with its transpose, which is the derivative of that linear map.

    Returns:
        What the body returns.
    """
    return _diff.with_vjp(
        lambda u: (operator(u), None),
        [_tree.zeros_like(operator.like)],
        lambda _, __, back: body(replace(operator, transpose=lambda u: back(u)[0])),
    )
