"""The penalty method: closed forms, its order in σ, and what it says where it cannot answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo import _tree
from funcmlo.hypergrad.penalty import stencil
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, dense_implicit, fingerprint
from tests.programs import BATCHES, program, start
from tests.registry import STRUCTURES, quadratic, solved, vector_like
from tests.test_estimators import tanh_net

# Eigenvalues in [1/3, 1]: sixty steps of rate 1 leave (2/3)^60 ≈ 3e-11 of the way.
STEPS = 60


def at_solution(loss: Callable[..., torch.Tensor], y: object, inputs: dict[str, object], rate: float = 1.0) -> fm.Solved:
    return solved(loss, y, inputs, fm.Penalty(), torchopt.sgd(rate))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("order", [1, 2, 4])
def test_closed_form_on_every_structure(order: int, structure: str) -> None:
    params = _tree.map(torch.Tensor.double, STRUCTURES[structure]())
    inputs = {"x": torch.zeros(3).double(), "z": _tree.map(torch.Tensor.double, STRUCTURES["nested"]()), "none": {}}
    problem, v = quadratic(params, inputs, seed=1), vector_like(params, seed=2)
    at = at_solution(problem.loss, problem.solution(), problem.inputs)
    before = fingerprint((at.params, at.inputs, at.opt_state, v))
    estimator = fm.Penalty(steps=STEPS, order=order)
    answer, state, stats = estimator.vjp(at, v, "state")
    assert fingerprint((at.params, at.inputs, at.opt_state, v)) == before
    assert state == "state"
    assert bits(estimator.vjp(at, v, None)[0]) == bits(answer)
    assert _tree.mismatch(problem.inputs, answer) is None
    for name, reference in problem.response(v).items():
        # On a quadratic the difference has no error but rounding, ε/σ = ε^(order/(order + 1)) times a few norms.
        assert_agrees(answer[name], reference, relative=100 * 2.2e-16 ** (order / (order + 1)), size=10.0)
    assert bool(stats.converged)
    assert stats.gradients == order * STEPS + 2 if order == 1 else order * (STEPS + 1)


def logarithm(y: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ e^y − xy, solved by log x."""
    return (torch.exp(y) - inputs["x"] * y).sum()


@pytest.mark.parametrize("order", [1, 2, 4, 6])
def test_the_error_is_of_the_order_that_is_said(order: int) -> None:
    # At x = 1 y_s = log(1 − s) and ∇_x g = −y_s, so the answer is that of the stencil on −log(1 − s), whose derivative at 0
    # is 1. With m = order/2 and h = σ its error is h^2m (m!)²/(2m + 1)! · f^(2m + 1)(0) = h^2m (m!)²/(2m + 1), up to O(h²)
    # of itself; one-sided it is h/2 · f″(0), up to O(h).
    off = []
    for sigma in (0.1, 0.05):
        estimator = fm.Penalty(sigma, steps=80, order=order)
        at = at_solution(logarithm, torch.zeros(1).double(), {"x": torch.ones(1).double()})
        answer, _, stats = estimator.vjp(at, torch.full((1,), 7.0).double(), None)
        error = float(answer["x"]) / 7 - 1
        exact = -sum(w * math.log(1 - j * sigma) for j, w in stencil(order).items()) / sigma - 1
        assert error == pytest.approx(exact, abs=1e-13 / sigma)
        # The residual is that of the system: ∇_y g = e^y − 1 = −s to the last step, whatever σ is.
        assert float(stats.residual) < 1e-10
        off.append(abs(error))
    m = order // 2
    leading = 0.05**order * math.factorial(m) ** 2 / (2 * m + 1) if m else 0.05 / 2
    assert off[1] == pytest.approx(leading, rel=0.1)
    assert off[0] / off[1] == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize("order", [1, 2, 4, 6, 8])
def test_the_weights_differentiate_polynomials_of_their_order(order: int) -> None:
    for power in range(order + 1):
        slope = sum(w * float(j) ** power for j, w in stencil(order).items())
        assert slope == pytest.approx(float(power == 1), abs=1e-12)
    assert len(stencil(order)) == max(order, 2)


NET = {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2).double(), "out": torch.zeros(2).double()}
INPUTS = {"weights": vector_like(torch.zeros(6).double(), 1), "log_decay": torch.tensor(-3.0).double()}
V = vector_like(NET, 2)


@pytest.mark.parametrize(
    ("optimizer", "own"),
    [(torchopt.sgd(0.5), None), (torchopt.sgd(0.2, momentum=0.6), None), (torchopt.adam(0.05), torchopt.sgd(0.5))],
    ids=["sgd", "momentum", "adam"],
)
def test_implicit_formula_on_a_net(optimizer: object, own: object) -> None:
    # Adam solves the level, and plain steps make the runs, which have to settle within σ.
    at = solved(tanh_net, vector_like(NET, 0), INPUTS, fm.Penalty(), optimizer, steps=500)
    answer, _, stats = fm.Penalty(order=4, optimizer=own).vjp(at, V, None)
    assert bool(stats.converged)
    assert not bool(stats.negative_curvature)
    for name, reference in dense_implicit(tanh_net, at.params, INPUTS, V).items():
        # The eigenvalues are 0.07 to 2.1. Order 4 with σ = ε^(1/5) (1 + ‖y*‖) = 2e-3 is off by 3e-8 there, and the runs' 500
        # steps leave (1 − 0.5 · 0.07)^500 = 2e-8 of theirs.
        assert_agrees(answer[name], reference, relative=1e-6)
    if own is None:
        # Reverse mode through the same steps is 500 times as far from its limit.
        trajectory = solved(tanh_net, vector_like(NET, 0), INPUTS, fm.ITD(), optimizer, steps=500)
        assert_agrees(answer, ravel(fm.ITD().vjp(trajectory, V, None)[0]), relative=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_that_is_chosen_suits_the_dtype(dtype: torch.dtype) -> None:
    at = at_solution(logarithm, torch.zeros(3, dtype=dtype), {"x": torch.ones(3, dtype=dtype)})
    for size in (1e-20, 1.0, 1e20):
        answer, _, stats = fm.Penalty(steps=40).vjp(at, torch.full((3,), size, dtype=dtype), None)
        assert answer["x"].dtype == dtype
        # σ² and ε/σ are both ε^⅔, here times at most ten.
        assert torch.allclose(
            answer["x"].double() / size, torch.ones(3).double(), rtol=10 * torch.finfo(dtype).eps ** (2 / 3)
        )
        assert float(stats.residual) < 10 * torch.finfo(dtype).eps ** (2 / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sigma_is_relative_to_the_cotangent_alone(dtype: torch.dtype) -> None:
    seen = []

    def loss(y: list[torch.Tensor], x: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append([leaf.detach() for leaf in y])
        return (y[0] * x["x"]).sum()

    y = [torch.full((2,), 30.0).double(), torch.full((1,), 40.0, dtype=dtype)]
    at = at_solution(loss, y, {"x": torch.zeros(2).double()})
    for sigma, expected in ((0.25, 0.25), (None, torch.finfo(dtype).eps ** (1 / 3) * (1 + (2 * 900 + 1600) ** 0.5))):
        seen.clear()
        fm.Penalty(sigma, steps=1).vjp(at, [torch.full((2,), 6.0).double(), torch.full((1,), 7.0, dtype=dtype)], None)
        # One step of rate 1 on σ⟨v, y⟩/‖v‖, where ‖v‖ = 11; the other run goes the other way.
        assert float(30.0 - seen[1][0][0]) == pytest.approx(expected * 6 / 11, rel=1e-6)
        assert float(seen[3][0][0] - 30.0) == pytest.approx(expected * 6 / 11, rel=1e-6)


def test_mixed_dtypes_are_kept_and_zero_gives_zero() -> None:
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones((), dtype=torch.float64), "c": torch.ones(0, 2)}
    inputs = {"x": {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}, "z": torch.ones(3, dtype=torch.bfloat16)}

    def loss(y: dict[str, torch.Tensor], x: dict[str, object]) -> torch.Tensor:
        pull = sum(leaf.float().sum() for leaf in _tree.leaves(x))
        return sum(((leaf.float() - pull) ** 2).sum() for leaf in y.values())

    for order in (1, 2):  # where the level is far from solved, so that order 1 sees the drift
        at = solved(loss, params, inputs, fm.Penalty(), torchopt.adam(0.1), steps=2)
        answer, _, _ = fm.Penalty(order=order).vjp(at, vector_like(params, 0), None)
        assert _tree.mismatch(inputs, answer) is None
        assert bool(_tree.norm(answer) > 0)
        answer, _, stats = fm.Penalty(order=order).vjp(at, _tree.zeros_like(params), None)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in _tree.leaves(answer))
        assert (float(stats.residual), bool(stats.converged), bool(stats.negative_curvature)) == (0.0, True, False)
    answer, _, _ = fm.Penalty().vjp(at, _tree.map(lambda x: x + torch.nan, params), None)
    assert torch.isnan(ravel(answer)).all()


def test_zero_curvature_gives_what_the_steps_reached_and_says_so() -> None:
    x, v = {"x": torch.ones(2).double()}, torch.tensor([3.0, 4.0]).double()
    flat = at_solution(lambda y, x: (y * x["x"]).sum(), torch.zeros(2).double(), x, rate=0.1)
    answer, _, stats = fm.Penalty(0.01, steps=5).vjp(flat, v, None)
    assert torch.allclose(answer["x"], -0.5 * v)  # five steps of 0.1 along −v, and ∇²_xy g is the identity
    assert float(stats.residual) == pytest.approx(1.0)
    assert not bool(stats.converged)


@pytest.mark.parametrize("steps", [30, 2000])
def test_a_run_without_a_minimum_is_stopped_and_told(steps: int) -> None:
    x, v = {"x": torch.ones(2).double()}, torch.tensor([1.0, 2.0]).double()
    saddle = at_solution(
        lambda y, x: (y[0] ** 2 - y[1] ** 2) / 2 - (y * x["x"]).sum(), torch.tensor([1.0, -1.0]).double(), x
    )
    answer, _, stats = fm.Penalty(1e-3, steps=steps).vjp(saddle, v, None)
    assert torch.isfinite(answer["x"]).all()
    # Each step doubles the distance, from 1e-3: about fifteen reach 10 (1 + ‖y*‖) = 24, where the runs stop.
    assert float(answer["x"].abs().max()) < 24.2 / 1e-3 * v.norm()
    assert bool(stats.negative_curvature)
    assert not bool(stats.converged)
    assert float(stats.residual) > 1e3
    solve = fm.argmin(
        lambda y, x: -(y**2).sum() / 2 + (y * x).sum(), torchopt.sgd(1.0), steps=0, response=fm.Penalty(steps=steps)
    )
    solution = solve(torch.ones(2), torch.ones(2, requires_grad=True))
    with pytest.raises(fm.EstimatorError, match=r"Penalty\(.* met a direction of zero or negative curvature"):
        solution.sum().backward()


def test_the_runs_stay_in_the_levels_set() -> None:
    # The minimizer of ½‖y − x‖² on y ≥ 0 is max(x, 0), so that what pushes against the wall does not come back.
    solve = fm.argmin(
        lambda y, x: ((y - x) ** 2).sum() / 2,
        torchopt.sgd(0.5),
        steps=60,
        response=fm.Penalty(1e-3),
        project=lambda y: y.clamp(min=0.0),
    )
    x = torch.tensor([1.0, -1.0]).double()
    with pytest.warns(fm.FuncmloWarning, match="relative residual"):  # half of v is the wall's
        answer = torch.autograd.grad(solve(torch.ones(2).double(), x.requires_grad_()).sum(), x)[0]
    assert torch.allclose(answer, torch.tensor([1.0, 0.0]).double())


def test_programs_and_mapped_programs() -> None:
    p = program(fm.Penalty(steps=200))  # 0.9^200 = 7e-10
    state = p.init(start())
    batches = {"y": BATCHES[0]}
    exact = program(fm.AID(fm.CG(5))).hypergradient(state, batches, of="x")
    assert_agrees(p.hypergradient(state, batches, of="x"), exact, relative=1e-6)
    assert torch.isfinite(p.step(state, batches)[0].params["x"]).all()

    def loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((y - x) ** 2).sum() / 2 + 0.1 * (y**4).sum()

    points = torch.stack([vector_like(torch.zeros(3).double(), i) for i in range(3)])
    rows = []
    for response in (fm.Penalty(order=4), fm.AID(fm.CG(10))):
        solve = fm.argmin(loss, torchopt.sgd(0.2), steps=200, response=response)
        gradient = torch.func.grad(lambda x, solve=solve: torch.sin(solve(torch.zeros(3).double(), x)).sum())
        rows.append(torch.func.vmap(gradient)(points))
        assert_agrees(gradient(points[0]), rows[-1][0], relative=1e-9)
    assert_agrees(rows[0], ravel(rows[1]), relative=1e-8)


def test_the_runs_begin_with_a_fresh_optimizer() -> None:
    at = solved(tanh_net, vector_like(NET, 0), INPUTS, fm.Penalty(), torchopt.sgd(0.2, momentum=0.6), steps=3)
    unknown = replace(at, opt_state=None)
    assert bits(fm.Penalty(order=1).vjp(at, V, None)[0]) == bits(fm.Penalty(order=1).vjp(unknown, V, None)[0])


def test_answers_cut_from_the_graph_are_not_differentiated_again() -> None:
    class Constant(fm.BestResponse):
        claims = fm.Claims(target="identity")

        def vjp(self, solved, cotangent, state):
            return _tree.detach(solved.inputs), state, fm.Stats()

    x = {"x": torch.ones(1).double()}
    at = at_solution(logarithm, torch.zeros(1).double(), x)
    solve = fm.argmin(lambda y, x: logarithm(y, {"x": x}), torchopt.sgd(1.0), steps=2, response=Constant())

    def within(x: torch.Tensor) -> torch.Tensor:
        return fm.Penalty(steps=2).vjp(replace(at, inputs={"x": x}), at.inputs["x"], None)[0]["x"].sum()

    def along(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda x: solve(torch.zeros(1).double(), x).sum())(x).sum()

    for function, name in ((within, "Penalty"), (along, "Constant")):
        with pytest.raises(fm.EstimatorError, match=rf"{name}(\(.*\))? cannot be differentiated again"):
            torch.func.grad(function)(x["x"])


def test_where_it_cannot_work() -> None:
    at = at_solution(logarithm, torch.zeros(1), {"x": torch.ones(1)})
    with pytest.raises(fm.EstimatorError, match=r"as many steps as the level made, but none .*; give steps="):
        fm.Penalty().vjp(at, torch.ones(1), None)
    root = fm.fixed_point(lambda y, x: y / 2 + x, steps=4, response=fm.Penalty())
    with pytest.raises(fm.EstimatorError, match="Penalty needs a loss, and a fixed point has none"):
        torch.func.grad(lambda x: root(torch.zeros(()), x))(torch.ones(()))
    closed = fm.Solver(lambda y, x: x.clone())
    for response, steps in ((fm.Penalty(steps=3), 1), (fm.Penalty(steps=60, optimizer=torchopt.sgd(0.5)), 1)):
        solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum() / 2, closed, steps=steps, response=response)
        gradient = torch.func.grad(lambda x, solve=solve: solve(torch.zeros(2), x).sum())
        if response.optimizer is None:
            with pytest.raises(fm.EstimatorError, match=r"an outside solver has no steps; give optimizer="):
                gradient(torch.ones(2))
        else:
            assert torch.allclose(gradient(torch.ones(2)), torch.ones(2), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.Penalty(0.0), r"Penalty\(sigma=0.0\): expected a positive number, or None"),
        (lambda: fm.Penalty(torch.inf), r"sigma=inf\): expected a positive number"),
        (lambda: fm.Penalty(True), r"sigma=True\): expected a positive number"),
        (lambda: fm.Penalty(0.1, steps=0), r"steps=0\): expected an integer of at least 1"),
        (lambda: fm.Penalty(0.1, order=3), r"order=3\): expected 1 or an even number"),
        (lambda: fm.Penalty(0.1, order=0), r"order=0\): expected an integer of at least 1"),
        (lambda: fm.Penalty(0.1, optimizer=torchopt.sgd), r"optimizer=<function sgd .*expected a functional optimizer"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        make()
