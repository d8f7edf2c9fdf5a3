"""Any curvature and any cotangent: a defined answer with its stats, never NaN, from every estimator in the registry."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from tests.registry import ESTIMATORS, solved

HESSIANS = {
    "zero": [0.0, 0.0, 0.0],
    "singular": [0.7, 0.0, 0.0],
    "indefinite": [1.0, -0.5, 0.3],
    "negative": [-1.0, -2.0, -0.1],
    "positive": [1.0, 0.5, 0.3],
}
COTANGENTS = {"zero": [0.0, 0.0, 0.0], "ordinary": [1.0, 1.0, -1.0], "tiny": [0.0, 1e-200, 0.0]}


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("curvature", HESSIANS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_answer_is_finite_and_the_stats_say_what_it_is_worth(name: str, curvature: str, cotangent: str) -> None:
    h, v = (torch.tensor(values).double() for values in (HESSIANS[curvature], COTANGENTS[cotangent]))
    estimator = ESTIMATORS[name](1.0, 3)

    def loss(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (h * y**2).sum() / 2 - (y * inputs["x"]).sum()

    x = torch.tensor([1.0, -2.0, 0.5]).double()
    at = solved(loss, torch.zeros(3).double(), {"x": x}, estimator, steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)  # a series that diverges says so
        answers, state, stats = estimator.vjp(at, v, estimator.init(v))
    assert torch.isfinite(answers["x"]).all()
    assert _tree.finite(state)
    assert cotangent != "zero" or torch.equal(answers["x"], v)
    told = stats.plain()
    assert told.residual is None or 0 <= told.residual < float("inf")
    # Jᵀv = v/h; whoever calls a solve converged has it, to the solver's tolerance and the least curvature, 0.1.
    if estimator.claims.target == "implicit" and told.converged and (h != 0).all() and not told.negative_curvature:
        assert torch.allclose(answers["x"], v / h, rtol=2e-2)
    if curvature == "positive" and estimator.claims.target == "implicit" and told.converged is not None:
        assert told.converged
