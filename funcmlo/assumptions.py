"""What an estimator may ask of a problem, so that it is judged only by what it promises."""

from __future__ import annotations

from typing import Literal

Assumption = Literal["minimization", "positive definite", "nonsingular", "its own level"]
"""What each says:

- "minimization": the condition that y* meets is ∇_y g = 0 of a cost g, so that its Jacobian is the symmetric ∇²_yy g; y* is
  no fixed point of a map. It need not be a minimum.
- "positive definite": that Hessian is positive definite, so y* is a strict minimum.
- "nonsingular": the Jacobian of the condition, of whatever kind, is nonsingular.
- "its own level": the problem is the very level that the estimator was made for.
"""
