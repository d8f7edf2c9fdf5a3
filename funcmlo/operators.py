"""Curvature as matrix-free linear operators with stated structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from funcmlo import _tree
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
    """

    matvec: Callable[[Tree], Tree]
    like: Tree
    symmetric: bool = True
    transpose: Callable[[Tree], Tree] | None = None
    adapt: Callable[[Tree], Tree] | None = None

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
