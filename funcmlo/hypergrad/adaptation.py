"""What a level's optimizer makes of a gradient, as a linear map."""

from __future__ import annotations

import torch

from funcmlo import _diff, _tree
from funcmlo._tree import Tree
from funcmlo.curvature.cross import gradient
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.solved import Solved


def adaptation(solved: Solved, v: Tree) -> Tree:
    """Return −(∂u/∂g)ᵀ v for the update u(g) that the optimizer would make next, at g = ∇_y g(y*, x).

    torchopt's updates are added, so u has the learning rate's minus sign in it: for gradient descent the answer is the
    learning rate times v, for Adam v scaled by its second moments.

    Args:
        solved: the level at its solution.
        v: a tree like `solved.params`.

    Returns:
        A tree like v.

    Raises:
        EstimatorError: the level has no optimizer; or v lies in a space with the optimizer's state in it.
    """
    parts, y, x = solved.parts, solved.params, solved.inputs
    if parts is None:
        raise EstimatorError(
            "the level has no optimizer (an outside solver or a fixed point), so there is no update to adapt to; use "
            "AID(CG(…)) or FiniteDifference()."
        )
    if _tree.structure(v) != _tree.structure(y):
        raise EstimatorError(
            "OptimizerIdentity scales a gradient, and curvature='fixed_point' has the optimizer's state beside it; use "
            "AID(Identity(), curvature='fixed_point'), whose answer is the derivative of one step."
        )

    def update(g: Tree) -> tuple[Tree, None]:
        return parts.updates(y, solved.opt_state, x, g, None)[0], None

    with torch.no_grad():  # the network is differentiated once
        g = gradient(solved, y, x)
    return _tree.negative(_diff.with_vjp(update, [g], lambda _, __, back: back(v)[0]))
