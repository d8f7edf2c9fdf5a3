"""Momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, is_nothing, spread
from funcmlo.optim.transformation import Mended, cast, counter


class TraceState(NamedTuple):
    """A momentum buffer and, where dampening needs it, whether it has seen a gradient; else ()."""

    trace: Tree
    started: Tensor | tuple[()]  # torch's vmap takes None for a leaf


def trace(momentum: Hyperparameter, dampening: Hyperparameter = 0.0, nesterov: bool = False) -> Mended | None:
    """Return m_{t+1} = μ m_t + (1 − τ) g_t with m_1 = g_0 in full, as torch.optim.SGD starts it; None where that is g.

    torchopt's own remembers in a closure whether it was called before, so the same call gives another answer the second
    time, and a restored run drops its momentum once.

    Args:
        momentum: μ.
        dampening: τ.
        nesterov: whether the update is g + μ m instead of m.

    Returns:
        The transformation.
    """
    if is_nothing(momentum):
        return None
    damped = not is_nothing(dampening)

    def init(params: Tree) -> TraceState:
        return TraceState(_tree.zeros_like(params), counter(params).bool() if damped else ())

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        g, structure = _tree.flatten(updates)
        mu = list(zip(g, spread(momentum, updates, "momentum"), strict=False))
        new, started = g, state.started
        if damped:
            tau = spread(dampening, updates, "dampening")
            new = [torch.where(started.to(x.device), (1 - d) * x, x) for x, d in zip(g, tau, strict=False)]
            started = torch.ones_like(started)
        old = _tree.leaves(state.trace)
        buffer = [cast(m * beta + x, m) for m, x, (_, beta) in zip(old, new, mu, strict=True)]
        answer = [x + m * beta for m, (x, beta) in zip(buffer, mu, strict=True)] if nesterov else buffer
        return _tree.unflatten(structure, answer), TraceState(_tree.unflatten(structure, buffer), started)

    return Mended(init, update)
