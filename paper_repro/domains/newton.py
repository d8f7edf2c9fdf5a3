"""Newton's method for softmax regression with a quadratic term: the outside solver of the two lower levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import funcmlo as fm

ITERATIONS = 200
TOLERANCE = 1e-12  # of the gradient: a curvature of at least s makes that a distance of at most 1e-12/s
ENOUGH = 0.1  # while an iteration shrinks the gradient to this, the next one takes the same Hessian again


def softmax_regression(x: Tensor, y: Tensor, weights: Tensor, strength: float, *, centre: Tensor, start: Tensor) -> Tensor:
    """Return argmin over θ of Σ_i w_i CE(θᵀx_i, y_i) + s/2 ‖θ − c‖², which is strongly convex.

    The Hessian's block of the classes a and b is Σ_i w_i p_ia (δ_ab − p_ib) x_i x_iᵀ + s δ_ab I.

    Args:
        x: inputs, (n, d) float64.
        y: labels, (n,) int64.
        weights: w, (n,), not negative.
        strength: s > 0.
        centre: c, (d, classes).
        start: where to start, (d, classes).

    Returns:
        θ*, (d, classes), where the gradient's norm is below 1e-12.

    Raises:
        EstimatorError: it was not reached.
    """
    d, classes = start.shape
    onehot = F.one_hot(y, classes).to(x.dtype)

    def cost(theta: Tensor) -> Tensor:
        losses = F.cross_entropy(x @ theta, y, reduction="none")
        return weights @ losses + strength / 2 * ((theta - centre) ** 2).sum()

    theta, value = start, cost(start)
    factor, before = None, torch.inf
    for _ in range(ITERATIONS):
        p = (x @ theta).softmax(dim=1)
        gradient = x.T @ (weights[:, None] * (p - onehot)) + strength * (theta - centre)
        norm = float(torch.linalg.vector_norm(gradient))
        if norm < TOLERANCE:
            break
        if factor is None or norm > ENOUGH * before:
            factor = torch.linalg.cholesky(_hessian(x, p, weights, strength))
        before = norm
        direction = torch.cholesky_solve(gradient.T.reshape(-1, 1), factor).reshape(classes, d).T
        slope, size = (gradient * direction).sum(), 1.0
        # The last steps change the cost by less than its rounding, which must not stop them.
        while (new := cost(theta - size * direction)) > value - 1e-4 * size * slope + 1e-14 * value.abs() and size > 1e-6:
            size /= 2
        theta, value = theta - size * direction, new
    else:
        raise fm.EstimatorError(f"softmax regression: a gradient of norm {norm:.3g} is left after {ITERATIONS} iterations.")
    return theta


def _hessian(x: Tensor, p: Tensor, weights: Tensor, strength: float) -> Tensor:
    """The Hessian for θ's columns one below the other, (classes · d, classes · d)."""
    n, classes = p.shape
    identity = torch.eye(classes, dtype=x.dtype)
    rows = []
    for a in range(classes):
        curvature = (weights * p[:, a])[:, None] * (identity[a] - p)  # (n, classes): over b
        rows.append(x.T @ (curvature[:, :, None] * x[:, None, :]).reshape(n, -1))
    hessian = torch.cat(rows)
    hessian.diagonal().add_(strength)
    return hessian
