"""Clipping by the gradient's norm, with the norm in the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.optim.transformation import Mended, stateless


def clip_grad_norm(max_norm: float | Tensor, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Mended:
    """Scale g by min(1, c / (‖g‖_p + 10⁻⁶)), as `torch.nn.utils.clip_grad_norm_` does.

    torchopt takes the norm without gradient and through `float()`, so a hypergradient through its clipping is wrong.

    Args:
        max_norm: c, a number or a 0-d tensor.
        norm_type: p; `torch.inf` for the largest entry.
        error_if_nonfinite: whether an infinite or NaN norm raises; not under transforms, which forbid to look.

    Returns:
        The transformation, to stand in front of an optimizer: `torchopt.chain(clip_grad_norm(1.0), sgd(0.1))`.

    Raises:
        DefinitionError: max_norm is neither a number nor a 0-d tensor.
        RuntimeError: at an update, where it was asked for.

    Example:
        >>> import torch
        >>> clip_grad_norm(1.0).update(torch.tensor([3.0, 4.0]), ())[0]
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063.
    """
    if not isinstance(max_norm, int | float) and not (isinstance(max_norm, Tensor) and not max_norm.dim()):
        raise DefinitionError(f"clip_grad_norm: max_norm={max_norm!r}; expected a number or a 0-d tensor.")

    def change(updates: Tree, params: Tree) -> Tree:
        leaves = [g for g in _tree.leaves(updates) if g.numel()]
        if not leaves:
            return updates
        norms = [_norm(g, norm_type).to(leaves[0].device, _tree.precision(updates)) for g in leaves]
        total = _norm(torch.stack(norms), norm_type)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"the gradients' norm of order {norm_type} is {float(total)}, so it cannot be clipped")
        return _tree.scale((max_norm / (total + 1e-6)).clamp(max=1.0), updates)

    return stateless(change)


def _norm(x: Tensor, order: float) -> Tensor:
    """‖x‖_p whose gradient at x = 0 is 0, its subgradient of least norm."""
    zero = (x == 0).all()
    norm = torch.linalg.vector_norm(torch.where(zero, torch.ones_like(x), x), order)
    return torch.where(zero, torch.zeros_like(norm), norm)
