"""How many copies of the parameters a hypergradient takes, counted in tensors and in processes of their own."""

from __future__ import annotations

import pytest
import torch

from funcmlo.comparing.peak_memory import peak_memory
from tests.benchmarks.large import ESTIMATORS, Case, measure, problem, run

N = 2_000_000
COUNTED = {
    "AID(CG(5, tol=0.0))": 5.2,  # v, x, r, p, Hp
    "AID(CG(5, tol=0.0), curvature=Hessian('recompute'))": 5.4,
    "AID(Neumann(20, scale=0.5))": 5.2,  # v, the term, the sum, a product, and the new term or a part of the product
    "FiniteDifference()": 2.2,  # v and the displaced parameters
}
"""Copies of 10 tensors, one or two tensors in work besides; a count sees sums of gradients that autograd makes in place."""


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_copies_of_the_parameters(estimator: str) -> None:
    program, state = problem(Case(estimator, N, 10), N)
    before = [x.clone() for x in (*state.params["y"], state.params["x"])]
    _, peak = peak_memory(lambda: program.hypergradient(state, {}, of="x", solve=False))
    assert peak / (4 * N) <= COUNTED[estimator] + 0.01 <= ESTIMATORS[estimator][0]
    assert all(map(torch.equal, before, (*state.params["y"], state.params["x"])))


def test_the_answers_are_right() -> None:
    for estimator in ESTIMATORS:
        # A finite difference has half of float32's digits.
        assert measure(Case(estimator, 200_000, 2))["error"] < 2e-3


@pytest.mark.parametrize("estimator", ["AID(CG(5, tol=0.0))", "FiniteDifference()"])
def test_a_process_takes_no_more_for_parameters_in_one_tensor(estimator: str) -> None:
    found = run(Case(estimator, 3 * N, 1))
    assert found["copies"] <= ESTIMATORS[estimator][0] + 0.05  # 24 MB a copy; small things take 1 MB
