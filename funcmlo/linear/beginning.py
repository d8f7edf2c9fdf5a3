"""How an iterative solve begins: with v/‖v‖, so that no product of norms under- or overflows, and near a start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.linear.arithmetic import Arithmetic, Flag, Scalar


def normalized(rhs: Tree, scalars: Arithmetic | None = None) -> tuple[Tree, Scalar, Flag]:
    """Scale a right-hand side to length one.

    Args:
        rhs: v.
        scalars: what is computed with; tensors for None.

    Returns:
        v/‖v‖, ‖v‖, and whether there is something to solve; a v whose 1/‖v‖ overflows counts as zero.
    """
    m, leaves = scalars or Arithmetic(known=False, dtype=_tree.precision(rhs)), _tree.leaves(rhs)
    v_norm = m.norm(leaves)
    # A NaN is something to solve too: its answer is NaN.
    some = (v_norm <= m.tiny) ^ True
    v = _tree.scale(m.where(some, 1 / m.where(some, v_norm, 1), 0), rhs)
    return v, m.where(some, v_norm, 0), some


def damped(product: Callable[[Tree], Tree], damping: float) -> Callable[[Tree], Tree]:
    """Return u ↦ (H + λI) u.

    Args:
        product: u ↦ Hu.
        damping: λ.

    Returns:
        The map; H's own for λ = 0.
    """
    return product if not damping else lambda u: _tree.add_scaled(product(u), damping, u)


def rounding(like: Tree) -> float:
    """Return what counts as zero relative to ‖H‖: a product carries a few machine epsilons, dividing by it would blow up.

    Args:
        like: a tree of the space that H acts on.

    Returns:
        64 ε of the coarsest leaf; in half precision, where that is no small number, ε^¾.
    """
    epsilon = _tree.coarsest_epsilon(like)
    return float(min(64 * epsilon, epsilon**0.75))


def begin(product: Callable[[Tree], Tree], v: Tree, start: Tree) -> tuple[Tree, Tree]:
    """Begin at αs, with the α that makes the residual v − αHs least: one product.

    A start that takes less than a quarter of ‖v‖² away is not worth its direction: zero is taken. (Where Hs is
    nothing but rounding, α is huge, and αs would bury the solution.)

    Args:
        product: u ↦ Hu.
        v: the right-hand side, of length one or zero.
        start: s, any multiple of an approximate solution.

    Returns:
        x and v − Hx.
    """
    zero, length = _tree.zeros_like(v), _tree.norm(start)
    usable = (length > 0) & torch.isfinite(length)
    s = _tree.where(usable, _tree.scale(1 / torch.where(usable, length, 1), start), zero)
    hs = product(s)
    height = _tree.norm(hs)
    t = _tree.scale(torch.where(height > 0, 1 / torch.where(height > 0, height, 1), 0), hs)
    cosine = _tree.dot(t, v)
    good = cosine.abs() >= 0.5
    alpha = torch.where(good, cosine / torch.where(good, height, 1), 0)
    return _tree.scale(alpha, s), _tree.add_scaled(v, -torch.where(good, cosine, 0), t)


def attained(product: Callable[[Tree], Tree], v: Tree, x: Tree, residual: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Say how good a solution is at the end, where a recursion's residual has lost touch with the true one.

    In float64 the recursion's is taken. In a lower precision one product more gives the true residual; the solve is then
    called converged if the recursion met its target and the true residual is within ten times that or √ε, the half of
    the digits.

    Args:
        product: u ↦ Hu.
        v: the right-hand side, of length one or zero.
        x: the solution for it.
        residual: ‖v − Hx‖ by the recursion.
        target: what the recursion was to reach.

    Returns:
        The residual, and whether the solve has converged.
    """
    met, epsilon = residual <= target, _tree.coarsest_epsilon(v)
    if epsilon < 1e-10:
        return residual, met
    true = _tree.norm(_tree.subtract(v, product(x)))
    return true, met & (true <= max(10 * target, epsilon**0.5))


def rayleigh(u: Tree, hu: Tree, length: Scalar, scalars: Arithmetic | None = None) -> Scalar:
    """Return ⟨u, Hu⟩ / ⟨u, u⟩, also where ⟨u, u⟩ under- or overflows; 0 for u = 0.

    Args:
        u: a vector.
        hu: its product.
        length: ‖u‖.
        scalars: what is computed with; tensors for None.

    Returns:
        A scalar.
    """
    m = scalars or Arithmetic(known=False, dtype=_tree.precision(u))
    some = length > m.tiny
    inverse = m.where(some, 1 / m.where(some, length, 1), 0)
    return m.dot(_tree.leaves(_tree.scale(inverse, u)), _tree.leaves(hu)) * inverse
