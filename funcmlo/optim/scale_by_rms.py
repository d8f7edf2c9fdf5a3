"""RMSprop's direction, plain and centered."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import mean, mean_square, plus, root
from funcmlo.optim.transformation import Mended


class RmsState(NamedTuple):
    """The running means of g, where it is centered by it, else (), and of g²."""

    mu: Tree
    nu: Tree


def scale_by_rms(alpha: Hyperparameter, eps: Hyperparameter, initial_scale: float = 0.0, centered: bool = False) -> Mended:
    """Return u = g / (√v + ε), centered g / (√(v − m²) + ε), with running means m of g and v of g².

    The variance v − m² of a gradient that stands still is zero up to rounding, where torchopt's root may be NaN; here it
    is zero.

    Args:
        alpha: the decay of the running means.
        eps: ε.
        initial_scale: where v begins.
        centered: whether the mean is taken off.

    Returns:
        The transformation.

    References:
        Tieleman and Hinton 2012, lecture 6.5 of Neural Networks for Machine Learning; centered: Graves 2013, arXiv
        1308.0850, eq. 38 to 41.
    """

    def init(params: Tree) -> RmsState:
        nu = _tree.map(lambda p: torch.full_like(p, initial_scale), params)
        return RmsState(_tree.zeros_like(params) if centered else (), nu)

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        decays = [a for _, a in zip(gs, spread(alpha, updates, "alpha"), strict=False)]
        nu = [mean_square(v, g, a) for v, g, a in zip(_tree.leaves(state.nu), gs, decays, strict=True)]
        mu: Tree = ()
        variances = nu
        if centered:
            means = [mean(m, g, a) for m, g, a in zip(_tree.leaves(state.mu), gs, decays, strict=True)]
            variances = [torch.addcmul(v, m, m, value=-1.0) for v, m in zip(nu, means, strict=True)]
            mu = _tree.unflatten(structure, means)
        epsilons = spread(eps, updates, "eps")
        answer = [g / plus(root(v), e) for g, v, e in zip(gs, variances, epsilons, strict=False)]
        return _tree.unflatten(structure, answer), RmsState(mu, _tree.unflatten(structure, nu))

    return Mended(init, update)
