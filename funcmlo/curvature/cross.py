"""The cross product ∇²_xy g · w alone: by automatic differentiation, or by a central difference."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmlo import _diff, _tree
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.solved import Solved
from funcmlo.linear.arithmetic import Arithmetic, Scalar


def mixed_product(solved: Solved, w: Tree) -> dict[str, Tree]:
    """Return −∇²_xy g · w for every input, by reverse mode over reverse mode.

    Args:
        solved: the level at its solution.
        w: a tree like `solved.params`.

    Returns:
        The products by input name.
    """
    products: dict[str, Tree] = _diff.with_vjp(
        lambda x: (gradient(solved, solved.params, x), None), [solved.inputs], lambda _, __, back: _tree.negative(back(w)[0])
    )
    return products


def mixed_difference(solved: Solved, w: Tree, scale: float | None = None) -> dict[str, Tree]:
    """Return −∇²_xy g · w ≈ −[∇_x g(y* + εw, x) − ∇_x g(y* − εw, x)] / 2ε for every input: two gradients.

    Args:
        solved: the level at its solution.
        w: a tree like `solved.params`.
        scale: None chooses ‖εw‖ = √ε_m (1 + ‖y*‖) for the machine epsilon ε_m of the coarsest dtype among the level and
            its inputs; a number c sets ε = c/‖w‖.

    Returns:
        The products by input name, each in its input's dtype.

    Raises:
        EstimatorError: the problem is a fixed point, which has no loss.
    """

    def gradients(y: Tree) -> dict[str, Tree]:
        slope: dict[str, Tree]
        _, _, (slope,), _ = _diff.value_and_grads(lambda x: (solved.loss(y, x), None), [solved.inputs])
        return slope

    with torch.no_grad():
        epsilon = _step(solved, w, scale)
        ahead = gradients(_tree.add_scaled(solved.params, epsilon, w))
        behind = gradients(_tree.add_scaled(solved.params, -epsilon, w))
    products: dict[str, Tree] = difference_quotient(behind, ahead, epsilon)
    return products


def difference_quotient(a: Tree, b: Tree, epsilon: Scalar) -> Tree:
    """Return (a − b) / 2ε, each leaf in its dtype.

    Args:
        a: a tree.
        b: a tree like it.
        epsilon: ε.

    Returns:
        A tree like a.
    """

    def quotient(p: Tensor, q: Tensor) -> Tensor:
        if not isinstance(epsilon, Tensor):
            return torch.mul(p - q, 0.5 / epsilon)
        wide = torch.promote_types(p.dtype, epsilon.dtype)  # 1/2ε may be beyond half precision
        return ((p.to(wide) - q.to(wide)) * (0.5 / epsilon.to(p.device))).to(p.dtype)

    return _tree.map(quotient, a, b)


def gradient(solved: Solved, y: Tree, x: dict[str, Tree]) -> Tree:
    """Return ∇_y g(y, x), in the graph where grad mode is on.

    Args:
        solved: the level.
        y: where the gradient is taken.
        x: the inputs there.

    Returns:
        A tree like y.
    """
    _, _, (slope,), _ = _diff.value_and_grads(lambda at: (solved.loss(at, x), None), [y])
    return slope


def check_loss(owner: str, solved: Solved) -> None:
    """Raise unless a problem is a minimization.

    Args:
        owner: who asks, for the message.
        solved: the problem.

    Raises:
        EstimatorError: it is a fixed point.
    """
    if solved.condition is not None:
        raise EstimatorError(f"{owner} needs a loss, and a fixed point has none; use AID(GMRES(…)) or ITD().")


def _step(solved: Solved, w: Tree, scale: float | None) -> Scalar:
    """ε; any finite number does for w = 0, where both gradients are the same."""
    m = Arithmetic.of(solved.params, solved.inputs, w)
    w_norm = m.norm(_tree.leaves(w))
    length = scale
    if length is None:
        # The gradients by the inputs are no better than the coarsest leaf that goes into them or comes out.
        length = solved.epsilon(w) ** 0.5 * (1 + m.norm(_tree.leaves(solved.params)))
    return length / m.where(w_norm > 0, w_norm, 1)
