"""Adam's direction."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.optim.hyperparameters import Hyperparameter, spread
from funcmlo.optim.roots import corrections, mean, mean_square, plus, root
from funcmlo.optim.transformation import Mended, counter, wide


class Moments(NamedTuple):
    """The running means of g (mu) and of g², or what stands for it (nu), and the number of steps."""

    mu: Tree
    nu: Tree
    step: Tensor


def start(params: Tree) -> Moments:
    """Return moments of zero."""
    return Moments(_tree.zeros_like(params), _tree.zeros_like(params), counter(params))


def scale_by_adam(b1: Hyperparameter, b2: Hyperparameter, eps: Hyperparameter, eps_root: Hyperparameter = 0.0) -> Mended:
    """Return u = m̂ / (√(v̂ + ε_r) + ε), with m̂ = m / (1 − β₁^t) and v̂ = v / (1 − β₂^t).

    m and v are running means of g and g². torchopt takes the bias corrections in float32.

    Args:
        b1: β₁.
        b2: β₂.
        eps: ε.
        eps_root: ε_r.

    Returns:
        The transformation.

    References:
        Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        gs, structure = _tree.flatten(updates)
        t = state.step + 1
        steps = t.to(wide(t.device))
        first, second = ([b for _, b in zip(gs, spread(b, updates, name), strict=False)] for b, name in betas)
        mu = [mean(m, g, b) for m, g, b in zip(_tree.leaves(state.mu), gs, first, strict=True)]
        nu = [mean_square(v, g, b) for v, g, b in zip(_tree.leaves(state.nu), gs, second, strict=True)]
        biases = (corrections(first, steps, mu), corrections(second, steps, nu))
        epsilons = (spread(eps, updates, "eps"), spread(eps_root, updates, "eps_root"))
        rows = zip(mu, nu, *biases, *epsilons, strict=False)
        answer = [(m / c) / plus(root(plus(v / k, er)), e) for m, v, c, k, e, er in rows]
        return _tree.unflatten(structure, answer), Moments(_tree.unflatten(structure, mu), _tree.unflatten(structure, nu), t)

    betas = ((b1, "betas[0]"), (b2, "betas[1]"))
    return Mended(start, update)
