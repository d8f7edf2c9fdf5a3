"""Euclidean projections on convex sets, and a proximal step, for `project=`.

P(y) = argmin_{z ∈ C} ‖z − y‖, leaf by leaf or over a whole tree, as plain functions of the tree and of what the set depends
on, which may be numbers or the parameters of another level. With constants they are wrapped in a lambda,
`project=lambda w: fm.projections.box(w, 0.0, 1.0)`; with a learned set its arguments are levels,
`project=lambda w, log_r: fm.projections.ball(w, log_r.exp())`.

All of them can be differentiated in reverse and in forward mode, again and again, and mapped by `torch.func.vmap`: which
constraints are active is decided entry by entry, never by a branch. At a kink, where P has several one-sided derivatives,
the answer is one element of its generalized Jacobian; it is finite everywhere. Sums and norms are computed in float32 at
least.
"""

from funcmlo.projections.balls import ball
from funcmlo.projections.boxes import box, nonnegative
from funcmlo.projections.proximal import soft_threshold
from funcmlo.projections.simplices import simplex

__all__ = ["ball", "box", "nonnegative", "simplex", "soft_threshold"]
