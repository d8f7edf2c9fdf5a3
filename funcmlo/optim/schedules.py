"""Rates that depend on the step's number t, a 0-d integer tensor that starts at 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.optim.closures import closed_over, maker
from funcmlo.optim.hyperparameters import Hyperparameter
from funcmlo.optim.transformation import wide

Schedule = Callable[[Tensor], Hyperparameter]


def per_step(rates: Tree) -> Schedule:
    """Return the schedule that takes the t-th of given rates at step t, and the last one from there on.

    Args:
        rates: a tensor of shape (T, …), or a tree of such tensors that is a prefix of the parameters' tree; lengths may
            differ.

    Returns:
        t → rates[min(t, T − 1)], leaf by leaf.

    Raises:
        DefinitionError: a leaf is no floating-point tensor with a first axis of at least 1.

    Example:
        >>> import torch
        >>> schedule = per_step(torch.tensor([0.3, 0.2, 0.1]))
        >>> schedule(torch.tensor(1)), schedule(torch.tensor(7))
        (tensor(0.2000), tensor(0.1000))
    """
    for path, x in _tree.named_leaves(rates):
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() and len(x)):
            came = f"a tensor of shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise DefinitionError(
                f"per_step: rates{path} is {came}; expected a floating-point tensor whose first axis counts the steps."
            )

    def take(x: Tensor, t: Tensor) -> Tensor:
        # Not x[t], which reads t on the host.
        return x.index_select(0, t.to(x.device).clamp(0, len(x) - 1).reshape(1)).squeeze(0)

    return lambda t: _tree.map(lambda x: take(x, t), rates)


def inverse_time(decay: Hyperparameter) -> Schedule:
    """Return t → 1 / (1 + decay · t), Adagrad's schedule."""
    return lambda t: _tree.map(lambda d: 1 / (1 + d * t.to(wide(t.device))), decay)


def exact(schedule: Schedule) -> Schedule:
    """Return a schedule of torchopt's in double precision, without a branch on t; any other one as it is.

    torchopt's divide the integer t, which torch makes float32; its exponential decay asks t for its value, which vmap
    refuses.

    Args:
        schedule: t → rate.

    Returns:
        The schedule that is called instead.
    """
    known = maker(schedule)
    if known == "_scale_by_neg_lr":
        inner = exact(closed_over(schedule)["lr"])
        return lambda t: -inner(t)
    if known == "exponential_decay":
        return _exponential(schedule)
    if known in {"polynomial_schedule", "_adagrad_lr_schedule"}:
        return lambda t: schedule(t.to(wide(t.device)))
    return schedule


def _exponential(schedule: Schedule) -> Schedule:
    """Decay as c · r^{max(t − t₀, 0) / T}, no further than to its end."""
    known: dict[str, Any] = closed_over(schedule)
    if "decay_rate" not in known:  # a constant
        return schedule
    bound = {} if known.get("end_value") is None else {"min" if known["clip_fn"] is max else "max": known["end_value"]}

    def value(t: Tensor) -> Tensor:
        p = (t.to(wide(t.device)) - known["transition_begin"]).clamp_min(0) / known["transition_steps"]
        rate: Tensor = known["init_value"] * known["decay_rate"] ** (p.floor() if known["staircase"] else p)
        return torch.clamp(rate, **bound) if bound else rate

    return value
