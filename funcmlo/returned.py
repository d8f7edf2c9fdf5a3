"""What a loss may return."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import LossError
from funcmlo.signature import BUFFERS


def checked_cost(name: str, returned: Any) -> tuple[Tensor, dict[str, Any]]:
    """Split what a loss returned into cost and metrics.

    Args:
        name: the level's name.
        returned: what its loss returned.

    Returns:
        The cost, a 0-d tensor, and the metrics.

    Raises:
        LossError: it is neither a scalar nor a pair of a scalar and a dict.
    """
    value, aux = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(value, Tensor):
        raise LossError(
            f"level '{name}': its loss returned {type(value).__name__}; expected a scalar tensor, or "
            "(scalar, dict of metrics)."
        )
    if value.dim():
        raise LossError(
            f"level '{name}': its loss returned a tensor of shape {tuple(value.shape)}; expected a scalar: reduce it "
            "with .mean() or .sum()."
        )
    if not value.is_floating_point():
        raise LossError(f"level '{name}': its loss returned dtype {value.dtype}; expected a real floating-point scalar.")
    if not isinstance(aux, dict):
        raise LossError(
            f"level '{name}': its loss returned {type(aux).__name__} beside the cost; expected a dict of metrics."
        )
    return value, aux


def new_buffers(name: str, before: Tree, aux: dict[str, Any]) -> tuple[Tree, dict[str, Any]]:
    """Take a level's new buffers out of what its loss returned beside the cost.

    Args:
        name: the level's name.
        before: its buffers before the update.
        aux: the dict that the loss returned.

    Returns:
        The new buffers, cut from any graph, and the metrics alone.

    Raises:
        LossError: they are missing, or unlike those before.
    """
    if BUFFERS not in aux:
        raise LossError(
            f"level '{name}': its loss reads buffers, but returned no new ones; expected (cost, {{'buffers': new}}), with "
            "output, new = net(params, x, buffers=buffers)."
        )
    if difference := _tree.mismatch(before, aux[BUFFERS]):
        raise LossError(f"level '{name}': the buffers that its loss returned and those it got differ: {difference}.")
    return _tree.detach(aux[BUFFERS]), {key: value for key, value in aux.items() if key != BUFFERS}
