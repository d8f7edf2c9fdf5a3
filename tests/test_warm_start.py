"""Warm starts: a linear solve goes on from the last outer step's solution, as estimator state in the program's state."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.hypergrad.warm import Drift
from tests.benchmarks.warm_start import TOLERANCE, measure
from tests.oracles import bits
from tests.registry import OPTIMIZERS, STRUCTURES, quadratic, solved, structures, vector_like

SOLVERS: dict[str, fm.LinearSolver] = {
    "cg": fm.CG(60, tol=1e-8),
    "minres": fm.MINRES(60, tol=1e-8),
    "gmres": fm.GMRES(60, tol=1e-8),
    "normal": fm.NormalEquations(fm.CG(60, tol=1e-8)),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_same_system_again_is_solved_at_once(solver: fm.LinearSolver) -> None:
    response = fm.AID(solver, warm_start=True)
    params = {"w": torch.zeros(3, 4).double(), "b": torch.zeros(4).double()}
    problem = quadratic(params, {"x": torch.zeros(2).double()}, seed=1, condition=50.0)
    at, v = solved(problem.loss, problem.solution(), problem.inputs, response), vector_like(params, 2)
    first, state, cold = response.vjp(at, v, response.init(params))
    again, state, warm = response.vjp(at, _tree.scale(-3.0, v), state)
    # One product tells that the start is good; the cotangent's size is no matter. The normal equations take two more.
    assert warm.hvps <= (4 if isinstance(solver, fm.NormalEquations) else 1) < cold.hvps
    assert torch.allclose(again["x"], -3 * first["x"], rtol=1e-6)
    assert warm.converged


@given(seed=st.integers(0, 2**20), like=structures())
def test_the_start_is_the_last_solution_moved_on(seed: int, like: object) -> None:
    w = [vector_like(like, seed + i) for i in range(3)]
    drift = Drift.begin(like)
    assert not any(float(x.abs().max()) for x in _tree.leaves(drift.start()) if x.numel())
    for solution in w:
        drift = drift.after(solution)
    before, last = _tree.subtract(w[1], w[0]), _tree.subtract(w[2], w[1])
    length = float(_tree.dot(before, before))
    trend = min(max(float(_tree.dot(last, before)) / length, 0.0), 1.0) if length else 0.0
    expected = _tree.add_scaled(w[2], trend, last)
    assert all(torch.allclose(x, y) for x, y in zip(_tree.leaves(drift.start()), _tree.leaves(expected), strict=True))


def test_a_steady_drift_is_foreseen() -> None:
    # Solutions on a line: from the fourth on the start is the solution itself.
    a, b = vector_like(torch.zeros(5).double(), 1), vector_like(torch.zeros(5).double(), 2)
    drift = Drift.begin(a)
    for t in range(3):
        drift = drift.after(a + t * b)
    assert torch.allclose(drift.start(), a + 3 * b, rtol=1e-12)


def run(response: fm.BestResponse, steps: int, upper: float = 0.05) -> tuple[list[fm.State], list[fm.Stats]]:
    """A stiff regression whose upper level moves slowly."""
    data = vector_like(torch.zeros(30, 8).double(), 3) * torch.logspace(0, 1.5, 8).double()
    labels = vector_like(torch.zeros(30).double(), 4)

    def ridge(w, decay):
        return ((data @ w - labels) ** 2).mean() + (torch.exp(decay) * w**2).sum()

    program = fm.Multilevel(
        fm.Level("w", ridge, torchopt.adam(0.05), steps=60, response=response),
        fm.Level("decay", lambda decay, w: ((data[:9] @ w - 1.0) ** 2).mean(), torchopt.sgd(upper)),
    )
    state = program.init({"w": torch.zeros(8).double(), "decay": torch.zeros(8).double()})
    states, stats = [state], []
    for _ in range(steps):
        state, metrics = program.step(state, {})
        states.append(state)
        stats.append(metrics["decay"]["stats"]["w"])
    return states, stats


def test_it_is_carried_in_the_programs_state() -> None:
    solver = fm.CG(60, tol=1e-6)
    states, warm = run(fm.AID(solver, warm_start=True), 12)
    _, cold = run(fm.AID(solver), 12)
    assert isinstance(states[0].response["w"], Drift)
    assert _tree.structure(states[0].response) == _tree.structure(states[-1].response)
    assert all(s.converged for s in (*warm, *cold))
    assert sum(s.hvps for s in warm[4:]) < sum(s.hvps for s in cold[4:])
    # A run that goes on from any state makes the same steps to the bit.
    again, _ = run(fm.AID(solver, warm_start=True), 12)
    assert bits(again[-1].params) == bits(states[-1].params)


@pytest.mark.filterwarnings("ignore:composition=")
def test_two_upper_levels_have_their_own_starts() -> None:
    response = fm.AID(fm.CG(20, tol=1e-10), warm_start=True)
    a = torch.diag(torch.logspace(0, 1, 4).double())
    program = fm.Multilevel(
        fm.Level("y", lambda y, p, q: 0.5 * y @ a @ y - y @ (p + 2 * q), torchopt.sgd(0.1), steps=5, response=response),
        fm.Level("p", lambda p, y: y[:2].sum(), torchopt.sgd(0.1)),
        fm.Level("q", lambda q, y: (y[2:] ** 2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({name: vector_like(torch.zeros(4).double(), i) for i, name in enumerate("ypq")})
    state, _ = program.step(state, {})
    kept = state.response["y"]
    # ∂f/∂y = (1, 1, 0, 0), so w = A⁻¹ of it for p; another for q.
    assert torch.allclose(kept["p"].solution, torch.linalg.solve(a, torch.tensor([1.0, 1.0, 0.0, 0.0]).double()), rtol=1e-8)
    assert float(kept["q"].solution[:2].abs().max()) < 1e-8 < float(kept["q"].solution[2:].abs().min())


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_gradient_steps_go_on_as_one_run(name: str) -> None:
    make = OPTIMIZERS[name]
    # Where nothing else moves, s outer steps of k gradient steps are one solve of s·k steps, momentum included.
    problem = quadratic(torch.zeros(5).double(), {"x": torch.zeros(2).double()}, seed=4)
    v = vector_like(torch.zeros(5).double(), 5)

    def answer(response: fm.AID, times: int) -> torch.Tensor:
        at, state = solved(problem.loss, problem.solution(), problem.inputs, response), response.init(v)
        for _ in range(times):
            answers, state, _ = response.vjp(at, v, state)
        return answers["x"]

    pieces = answer(fm.AID(fm.GradientSteps(make(), 3), warm_start=True), 4)
    assert torch.allclose(pieces, answer(fm.AID(fm.GradientSteps(make(), 12)), 1), rtol=1e-12)
    assert not torch.allclose(pieces, answer(fm.AID(fm.GradientSteps(make(), 3)), 1), rtol=1e-2)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_on_any_tree_and_at_a_fixed_point_of_the_step(structure: str) -> None:
    params = _tree.map(torch.Tensor.double, STRUCTURES[structure]())
    problem = quadratic(params, {"x": torch.zeros(3).double()}, seed=3)
    response = fm.AID(fm.GMRES(20, tol=1e-10), curvature="fixed_point", warm_start=True)
    at = solved(problem.loss, problem.solution(), problem.inputs, response, torchopt.sgd(0.5, momentum=0.5))
    state, v = response.init(params), vector_like(params, 6)
    for _ in range(2):
        answers, state, _ = response.vjp(at, v, state)
    assert torch.allclose(answers["x"], problem.response(v)["x"], rtol=1e-7, atol=1e-9)


def test_a_start_that_is_not_finite_does_no_harm() -> None:
    problem = quadratic(torch.zeros(4).double(), {"x": torch.zeros(2).double()}, seed=7)
    v = vector_like(torch.zeros(4).double(), 8)
    bad = Drift(v * torch.nan, v * torch.inf, torch.ones(()).double())
    for solver in SOLVERS.values():
        response = fm.AID(solver, warm_start=True)
        at = solved(problem.loss, problem.solution(), problem.inputs, response)
        answers, state, _ = response.vjp(at, v, bad)
        assert torch.allclose(answers["x"], problem.response(v)["x"], rtol=1e-5)
        assert _tree.finite(state.solution)


def test_programs_that_are_mapped() -> None:
    response = fm.AID(fm.CG(20, tol=1e-12), warm_start=True)
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: (torch.exp(y) - y * x).sum(), torchopt.sgd(0.2), steps=20, response=response),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )

    def twice(x: torch.Tensor) -> torch.Tensor:
        state = program.init({"y": torch.zeros(3).double(), "x": torch.ones(3).double()})
        state = fm.State(**{**vars(state), "params": {**state.params, "x": x}})
        for _ in range(2):
            state, _ = program.step(state, {})
        return state.params["x"]

    x = 1.0 + torch.rand(4, 3, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(torch.vmap(twice)(x), torch.stack([twice(each) for each in x]), rtol=1e-10)


def test_what_cannot_go_on_is_refused() -> None:
    for solver in (fm.Direct(), fm.Neumann(3, scale=0.1), fm.Nystrom(3, damping=0.1), fm.Identity()):
        with pytest.raises(fm.DefinitionError, match=rf"{type(solver).__name__} does not go on from a start; use CG"):
            fm.AID(solver, warm_start=True)
    with pytest.raises(fm.DefinitionError, match=r"warm_start='yes'\): expected True or False"):
        fm.AID(fm.CG(3), warm_start="yes")


def test_a_real_run_needs_a_third_of_the_products() -> None:
    # 100 outer steps of hyper-cleaning digits; `make bench-warm` prints the whole table.
    cold, warm = (measure(fm.CG(500, tol=TOLERANCE), warm=on, steps=100, upper_lr=0.1) for on in (False, True))
    assert max(cold.residual, warm.residual) <= TOLERANCE
    assert warm.mean <= cold.mean / 3
    assert abs(warm.cost - cold.cost) <= 0.01 * cold.cost
    assert all(n >= 1 for n in itertools.chain(cold.products, warm.products))
