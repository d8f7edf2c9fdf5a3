"""What an estimator may ask of a problem, so that it is judged only by what it promises."""

from __future__ import annotations

from typing import Literal

Assumption = Literal["minimization", "positive definite", "nonsingular", "its own level"]
"""That y* minimizes a cost g (it is no fixed point); that ∇²_yy g is positive definite there; that the Jacobian of the
condition that y* meets is nonsingular; that it is the very level that the estimator was made for."""
