"""Rectified Adam's direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import correction, corrections, mean, mean_square, plus, root
from funcmlo.optim.scale_by_adam import Moments, start
from funcmlo.optim.transformation import Mended, cast, wide


def scale_by_radam(b1: Hyperparameter, b2: Hyperparameter, eps: Hyperparameter) -> Mended:
    """Return u = m̂ r √(1 − β₂^t) / (√v + ε) from the step on where ρ_t > 5, and u = m̂ before.

    ρ_∞ = 2 / (1 − β₂) − 1 and ρ_t = ρ_∞ − 2 t β₂^t / (1 − β₂^t) are lengths of a simple moving average, and
    r² = (ρ_t − 4)(ρ_t − 2) ρ_∞ / ((ρ_∞ − 4)(ρ_∞ − 2) ρ_t) rectifies the variance of the adaptive rate.

    Args:
        b1: β₁.
        b2: β₂.
        eps: ε.

    Returns:
        The transformation.

    References:
        Liu et al. 2020, arXiv 1908.03265, algorithm 2 (there with 4 in the place of 5, here as in torch.optim).
    """

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        t = state.step + 1
        steps = t.to(wide(t.device))
        first, second = ([b for _, b in zip(gs, spread(b, updates, name), strict=False)] for b, name in betas)
        mu = [mean(m, g, b) for m, g, b in zip(_tree.leaves(state.mu), gs, first, strict=True)]
        nu = [mean_square(v, g, b) for v, g, b in zip(_tree.leaves(state.nu), gs, second, strict=True)]
        known: dict[object, tuple[Tensor, Tensor]] = {}
        answer = []
        rows = zip(mu, nu, corrections(first, steps, mu), second, spread(eps, updates, "eps"), strict=False)
        for m, v, c, b, e in rows:
            key = (id(b), v.dtype, v.device)
            if key not in known:
                known[key] = _rectification(b, steps, v)
            ready, r = known[key]
            answer.append(m / c * torch.where(ready, r / plus(root(v), e), 1.0))
        return _tree.unflatten(structure, answer), Moments(_tree.unflatten(structure, mu), _tree.unflatten(structure, nu), t)

    betas = ((b1, "betas[0]"), (b2, "betas[1]"))
    return Mended(start, update)


def _rectification(b2: float | Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Whether ρ_t > 5, and r √(1 − β₂^t), in double precision: ρ_t is a small difference of large numbers."""
    t = t.to(v.device, wide(v.device))
    b2 = b2.to(t.dtype) if isinstance(b2, Tensor) else b2
    bias = correction(b2, t, v.device)
    limit = 2 / (1 - b2) - 1
    rho = limit - 2 * t * (1 - bias) / bias
    ready = rho > 5
    rho = rho.clamp_min(5.0)  # so that no root of a negative number is differentiated
    r = (bias * (rho - 4) * (rho - 2) / rho * (limit / ((limit - 4) * (limit - 2)))).sqrt()
    return ready, cast(r, v) if not r.dim() else r
