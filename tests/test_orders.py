"""Each estimator's error falls, as its knob goes to its limit, at the rate of the theory; no bias where none is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo.operators import ravel
from tests.registry import Quadratic, quadratic, solved, vector_like

N = 8
CONDITION = 10.0


@pytest.fixture(name="problem")
def fixture_problem() -> Quadratic:
    """A quadratic with eigenvalues from 1/10 to 1."""
    return quadratic(torch.zeros(N).double(), {"x": torch.zeros(5).double()}, seed=3, condition=CONDITION)


def error(problem: Quadratic, response: fm.BestResponse, steps: int = 0, optimizer: object = None) -> float:
    """The relative distance from the implicit response."""
    v = vector_like(torch.zeros(N).double(), 4)
    start = problem.params if steps else problem.solution()
    at = solved(problem.loss, start, problem.inputs, response, optimizer, steps)
    answers, _, _ = response.vjp(at, v, response.init(v))
    exact = problem.response(v)["x"]
    return float((answers["x"] - exact).norm() / exact.norm())


# In the limit of many terms the least eigenvalue λ = 1/10 rules: each leaves 1 − αλ of what was there.
GEOMETRIC: dict[str, tuple[Callable[[Quadratic, int], float], float]] = {
    "neumann": (lambda p, k: error(p, fm.AID(fm.Neumann(k, scale=1.0))), 0.9),
    "half the scale": (lambda p, k: error(p, fm.AID(fm.Neumann(k, scale=0.5))), 0.95),
    "gradient steps": (lambda p, k: error(p, fm.AID(fm.GradientSteps(torchopt.sgd(1.0), k))), 0.9),
    "fixed point": (lambda p, k: error(p, fm.AID(fm.Neumann(k, scale=1.0), curvature="fixed_point")), 0.9),
    "itd": (lambda p, k: error(p, fm.ITD(), k, torchopt.sgd(1.0)), 0.9),
    "itd, mixed": (lambda p, k: error(p, fm.ITD(memory="mixed"), k, torchopt.sgd(1.0)), 0.9),
    "window": (lambda p, k: error(p, fm.ITD(window=k), 2 * k, torchopt.sgd(1.0)), 0.9),
}


@pytest.mark.parametrize("name", GEOMETRIC)
def test_a_series_converges_at_the_rate_of_its_slowest_mode(name: str, problem: Quadratic) -> None:
    distance, rate = GEOMETRIC[name]
    few, many = distance(problem, 80), distance(problem, 120)
    # At 80 terms the next mode, λ = 10^(−6/7), is (1 − 0.139)/(1 − 0.1) to the 80th, 3 %, of the slowest: 1e-3 per term.
    assert (many / few) ** (1 / 40) == pytest.approx(rate, abs=2e-3)


@pytest.mark.parametrize("solver", [fm.CG, fm.MINRES, fm.GMRES])
def test_krylov_solvers_meet_the_bound_of_the_condition_number(solver: type, problem: Quadratic) -> None:
    # The error is at most 2 √κ ((√κ − 1)/(√κ + 1))^k in the residual's norm (√κ between the norms), and 0 after n steps.
    root = math.sqrt(CONDITION)
    for k in range(1, N):
        assert error(problem, fm.AID(solver(k, tol=0.0))) <= 2 * CONDITION * ((root - 1) / (root + 1)) ** k
    assert error(problem, fm.AID(solver(N, tol=0.0))) <= 1e-10
    assert error(problem, fm.AID(solver(3, tol=0.0))) > 1e-4


def test_a_damping_costs_its_own_size(problem: Quadratic) -> None:
    # (H + ρI)⁻¹ = H⁻¹ − ρ H⁻² + O(ρ²).
    for make in (
        lambda rho: fm.AID(fm.Nystrom(N, damping=rho)),
        lambda rho: fm.AID(fm.CG(40, damping=rho)),
        lambda rho: fm.AID(fm.Direct(), curvature=fm.Damped(rho)),
    ):
        coarse, fine = error(problem, make(1e-4)), error(problem, make(1e-6))
        assert coarse / fine == pytest.approx(100, rel=2e-3)


def test_more_columns_are_never_worse_on_the_whole(problem: Quadratic) -> None:
    v = vector_like(torch.zeros(N).double(), 4)
    exact = torch.linalg.solve(problem.a + 1e-2 * torch.eye(N).double(), v)
    means = []
    for rank in (0, 2, 4, 6, N):
        solvers = [fm.Nystrom(rank, damping=1e-2, seed=s) if rank else fm.Identity(1e2) for s in range(10)]
        found = [solver.solve(fm.Operator(lambda u: problem.a @ u, like=v), v).value for solver in solvers]
        means.append(sum(float((w - exact).norm()) for w in found) / len(found))
    assert means == sorted(means, reverse=True)
    assert means[-1] <= 1e-9 * means[0]


def curved(y: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """exp(y)·(1 + sin x) + y²: third derivatives everywhere."""
    return (torch.exp(y) * (1 + torch.sin(inputs["x"]))).sum() + (y**2).sum()


@pytest.mark.parametrize(
    ("make", "exact"),
    [
        (lambda c: fm.FiniteDifference(scale=c), fm.AID(fm.Identity())),
        (lambda c: fm.SAMA(scale=c), fm.AID(fm.OptimizerIdentity())),
    ],
    ids=["finite difference", "sama"],
)
def test_central_differences_have_order_two(make: Callable[[float], fm.BestResponse], exact: fm.BestResponse) -> None:
    y, x, v = (vector_like(torch.zeros(4).double(), i) for i in (1, 2, 3))
    at = solved(curved, y, {"x": x}, fm.AID(fm.Direct()), torchopt.sgd(0.3))
    reference = ravel(exact.vjp(at, v, None)[0])
    errors = [float((ravel(make(c).vjp(at, v, None)[0]) - reference).norm()) for c in (1e-1, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.02)
    default = ravel(make(None).vjp(at, v, None)[0])
    assert torch.allclose(default, reference, rtol=1e-6)


def test_a_stochastic_series_is_unbiased() -> None:
    # g_i(y, x) = ½ a_i y² − b_i x y with (a, b) one of four pairs, drawn anew for each product: the mean over the draws is
    # the K-term series of the mean curvature, because different products' draws are independent.
    a, b = torch.tensor([0.2, 0.5, 0.8, 1.3]).double(), torch.tensor([2.0, 1.0, 0.3, -0.2]).double()
    terms, alpha, runs = 4, 0.6, 40_000
    mean_a, mean_b = float(a.mean()), float(b.mean())
    series = mean_b * alpha * sum((1 - alpha * mean_a) ** k for k in range(terms + 1))
    response = fm.AID(fm.Neumann(terms, scale=alpha), curvature=fm.Resampled())
    draws = torch.randint(4, (runs, terms + 2), generator=torch.Generator().manual_seed(0))
    program = fm.Multilevel(
        fm.Level("y", lambda y, x, batch: 0.5 * batch[0] * y**2 - batch[1] * x * y, torchopt.sgd(0.1), response=response),
        fm.Level("x", lambda x, y: 1.0 * y + 0.0 * x, torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(()).double(), "x": torch.ones(()).double()})

    def answer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # The inner loop's own batch is the first; the products take those after it.
        return program.hypergradient(state, {"y": lambda t: (a[t], b[t])}, of="x")

    answers = torch.vmap(answer)(a[draws], b[draws])
    standard_error = float(answers.std() / math.sqrt(runs))
    assert standard_error < 0.01 * series
    assert abs(float(answers.mean()) - series) <= 5 * standard_error  # false alarm: 6e-7
    # One batch for all products has the mean of a power instead of the power of the mean.
    biased = float((b * alpha * sum((1 - alpha * a) ** k for k in range(terms + 1))).mean())
    assert abs(biased - series) > 10 * standard_error
