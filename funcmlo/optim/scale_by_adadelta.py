"""Adadelta's direction."""

from __future__ import annotations

from typing import Any, NamedTuple

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import mean_square, plus, root
from funcmlo.optim.transformation import Mended


class AdadeltaState(NamedTuple):
    """The running means of g² (mu) and of the squared direction (nu)."""

    mu: Tree
    nu: Tree


def scale_by_adadelta(rho: Hyperparameter, eps: Hyperparameter) -> Mended:
    """Return u = √((ν + ε) / (μ + ε)) g, with running means μ of g² and ν of the u² before.

    Args:
        rho: the decay of both means.
        eps: ε.

    Returns:
        The transformation.

    References:
        Zeiler 2012, arXiv 1212.5701, algorithm 1.
    """

    def init(params: Tree) -> AdadeltaState:
        return AdadeltaState(_tree.zeros_like(params), _tree.zeros_like(params))

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        decays = [r for _, r in zip(gs, spread(rho, updates, "rho"), strict=False)]
        old = _tree.leaves(state.nu)
        mu = [mean_square(m, g, r) for m, g, r in zip(_tree.leaves(state.mu), gs, decays, strict=True)]
        rows = zip(mu, old, gs, spread(eps, updates, "eps"), strict=False)
        answer = [g * root(plus(v, e) / plus(m, e)) for m, v, g, e in rows]
        nu = [mean_square(v, u, r) for v, u, r in zip(old, answer, decays, strict=True)]
        state = AdadeltaState(_tree.unflatten(structure, mu), _tree.unflatten(structure, nu))
        return _tree.unflatten(structure, answer), state

    return Mended(init, update)
