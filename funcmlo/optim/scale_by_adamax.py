"""AdaMax's direction."""

from __future__ import annotations

from typing import Any

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import corrections, mean, plus
from funcmlo.optim.scale_by_adam import Moments, start
from funcmlo.optim.transformation import Mended, cast, wide


def scale_by_adamax(b1: Hyperparameter, b2: Hyperparameter, eps: Hyperparameter) -> Mended:
    """Return u = m / ((1 − β₁^t) n), with the running mean m of g and n ← max(β₂ n, |g| + ε).

    Args:
        b1: β₁.
        b2: β₂.
        eps: ε, which is in n, as in torch.optim's.

    Returns:
        The transformation.

    References:
        Kingma and Ba 2015, arXiv 1412.6980, algorithm 2.
    """

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        t = state.step + 1
        steps = t.to(wide(t.device))
        first = [b for _, b in zip(gs, spread(b1, updates, "betas[0]"), strict=False)]
        mu = [mean(m, g, b) for m, g, b in zip(_tree.leaves(state.mu), gs, first, strict=True)]
        rows = zip(_tree.leaves(state.nu), gs, spread(b2, updates, "betas[1]"), spread(eps, updates, "eps"), strict=False)
        nu = [cast(torch.maximum(n * b, plus(g.abs(), e)), n) for n, g, b, e in rows]
        answer = [m / n / c for m, n, c in zip(mu, nu, corrections(first, steps, mu), strict=True)]
        return _tree.unflatten(structure, answer), Moments(_tree.unflatten(structure, mu), _tree.unflatten(structure, nu), t)

    return Mended(start, update)
