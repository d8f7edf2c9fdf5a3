"""The reference hypergradient: float64, the lower problem solved to rounding, the linear system dense or converged."""

from __future__ import annotations

import torch
from torch import Tensor

import funcmlo as fm
from paper_repro.hypercleaning.methods import program
from paper_repro.hypercleaning.problem import Cleaning, Settings, minimize

# Beyond this many classifier parameters the dense Hessian takes minutes; conjugate gradient to 1e-10 takes its place.
LARGEST_DENSE = 1_500


def reference(problem: Cleaning, settings: Settings, weights: Tensor) -> tuple[Tensor, str]:
    """Return the exact hypergradient at these weights, and how it was had.

    Args:
        problem: the data and costs.
        settings: the rates.
        weights: the upper parameters, (n,).

    Returns:
        The hypergradient, (n,) float64, and `"dense"` or `"converged CG"`.

    Raises:
        EstimatorError: the linear system was not solved, so there is no reference.
    """
    weights = weights.double()
    start = {name: p.double() for name, p in problem.classifier().items()}
    solution = minimize(lambda classifier: problem.lower(classifier, weights), start)
    dense = sum(p.numel() for p in solution.values()) <= LARGEST_DENSE
    solver: fm.LinearSolver = fm.Direct() if dense else fm.CG(3_000, tol=1e-10)
    exact = program(problem, settings, fm.AID(solver))
    state = exact.init({"classifier": solution, "weights": weights})
    gradient, stats = exact.hypergradient(state, {}, of="weights", solve=False, with_stats=True)
    if not stats["classifier"].converged:
        raise fm.EstimatorError(f"the reference's linear system did not converge: {stats['classifier']}")
    return gradient, "dense" if dense else "converged CG"


def compare(estimate: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return relative error and cosine of an estimate.

    Args:
        estimate: (n,).
        exact: (n,).

    Returns:
        ‖estimate − exact‖ / ‖exact‖ and ⟨estimate, exact⟩ / (‖estimate‖ ‖exact‖).
    """
    estimate, exact = estimate.double(), exact.double()
    cosine = torch.nn.functional.cosine_similarity(estimate, exact, dim=0)
    return float((estimate - exact).norm() / exact.norm()), float(cosine)
