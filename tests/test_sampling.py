"""Estimators that probe the inner loop in random directions: their mean, their variance, their draws."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, fingerprint
from tests.programs import BATCHES, program, start
from tests.registry import OPTIMIZERS, STRUCTURES, quadratic, solved, vector_like
from tests.test_estimators import tanh_net

Make = Callable[..., fm.BestResponse]
SAMPLING: dict[str, Make] = {
    "forward gradient": fm.ForwardGradient,
    "perturbed solve": fm.PerturbedSolve,
    "central signs": functools.partial(fm.PerturbedSolve, central=True, distribution="rademacher"),
}
# What the difference adds to the sampling: nothing; √ε = 1.5e-8 and ε^⅔ = 4e-11 times the curvature of these nets and
# loops, and rounding of the same size divided by what is left of the answer in a few samples.
RELATIVE = {"forward gradient": 1e-10, "perturbed solve": 1e-5, "central signs": 1e-7}

SHAPES = {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2).double(), "out": torch.zeros(2).double()}
NET = _tree.scale(0.3, vector_like(SHAPES, 0))
INPUTS = {"weights": vector_like(torch.zeros(6).double(), 1), "log_decay": torch.zeros(()).double()}
V = vector_like(SHAPES, 2)


def net(response: fm.BestResponse, optimizer: object = None, steps: int = 5) -> fm.Solved:
    return solved(tanh_net, NET, INPUTS, response, optimizer or torchopt.sgd(0.1), steps=steps)


def mixing(estimator: fm.BestResponse, inputs: dict[str, object], steps: int) -> torch.Tensor:
    """M = 1/b Σ r rᵀ of the draws, so that the answer must be M Jᵀv: seen where y_T = x, so that J is the identity."""
    like = torch.zeros(_tree.size(inputs)).double()

    def loss(y: torch.Tensor, x: dict[str, object]) -> torch.Tensor:
        return ((y - ravel(x).double()) ** 2).sum() / 2

    at = solved(loss, like, inputs, estimator, torchopt.sgd(1.0), steps=steps)
    columns = [ravel(estimator.vjp(at, e, None)[0]).double() for e in torch.eye(len(like)).double()]
    return torch.stack(columns, dim=1) if columns else torch.zeros(0, 0).double()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SAMPLING)
def test_follows_what_the_optimizer_does(name: str, optimizer: str) -> None:
    estimator = SAMPLING[name](7)
    reference = ravel(fm.ITD().vjp(net(fm.ITD(), OPTIMIZERS[optimizer]()), V, None)[0])
    answer = estimator.vjp(net(estimator, OPTIMIZERS[optimizer]()), V, None)[0]
    expected = mixing(estimator, INPUTS, steps=5) @ reference
    assert_agrees(answer, expected, relative=RELATIVE[name], size=torch.linalg.vector_norm(reference))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SAMPLING)
def test_every_structure(name: str, structure: str) -> None:
    params = _tree.map(torch.Tensor.double, STRUCTURES[structure]())
    inputs = {"x": torch.zeros(3).double(), "z": _tree.map(torch.Tensor.double, STRUCTURES["nested"]()), "none": {}}
    problem = quadratic(params, inputs, seed=1)
    estimator, v = SAMPLING[name](5), vector_like(params, seed=2)
    reference, _, _ = fm.ITD().vjp(solved(problem.loss, problem.params, problem.inputs, fm.ITD(), steps=3), v, None)
    at = solved(problem.loss, problem.params, problem.inputs, estimator, steps=3)
    before = fingerprint((at.params, at.inputs, at.opt_state, at.init, v))
    answer, state, _ = estimator.vjp(at, v, "state")
    assert fingerprint((at.params, at.inputs, at.opt_state, at.init, v)) == before
    assert state == "state"
    assert _tree.mismatch(problem.inputs, answer) is None
    expected = mixing(estimator, problem.inputs, steps=3) @ ravel(reference)
    assert_agrees(answer, expected, relative=RELATIVE[name], size=10.0)


@pytest.mark.parametrize("name", SAMPLING)
def test_mixed_dtypes_are_kept(name: str) -> None:
    params = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones((), dtype=torch.float64), "c": torch.ones(0, 2)}
    inputs = {"x": {"a": torch.ones(2), "b": torch.ones((), dtype=torch.float64)}, "z": torch.ones(3, dtype=torch.bfloat16)}

    def loss(y: dict[str, torch.Tensor], x: dict[str, object]) -> torch.Tensor:
        pull = sum(leaf.float().sum() for leaf in _tree.leaves(x))
        return sum(((leaf.float() - pull) ** 2).sum() for leaf in y.values())

    for optimizer in (torchopt.sgd(0.1), torchopt.adam(0.1)):
        estimator = SAMPLING[name](3)
        at = solved(loss, params, inputs, estimator, optimizer, steps=2)
        answer, _, _ = estimator.vjp(at, vector_like(params, 0), None)
        assert _tree.mismatch(inputs, answer) is None
        assert _tree.finite(answer)
        assert bool(_tree.norm(answer) > 0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "clipped"])
def test_one_sign_is_exact_for_one_number(optimizer: str) -> None:
    def loss(y: object, x: dict[str, object]) -> torch.Tensor:
        return tanh_net(y, {"weights": INPUTS["weights"], **x})

    def at(response: fm.BestResponse) -> fm.Solved:
        return solved(loss, NET, {"log_decay": torch.zeros(()).double()}, response, OPTIMIZERS[optimizer](), steps=4)

    reference = ravel(fm.ITD().vjp(at(fm.ITD()), V, None)[0])
    one = fm.ForwardGradient(1)
    assert_agrees(one.vjp(at(one), V, None)[0], reference, relative=1e-12)


@pytest.mark.parametrize("name", SAMPLING)
def test_the_mean_is_without_bias(name: str) -> None:
    # With a = Jᵀv, Σ_i (a·r_i)²/(b‖a‖²) has mean 1 and variance at most 2/b, and the answer's entries have variance at most
    # (‖a‖² + a_i²)/b. At b = 40,000 five deviations are 0.035 and 0.025 ‖a‖: by the central limit theorem (b is
    # large) eight such tests fail by chance with probability 8 · 6e-7 = 5e-6, and a factor 1.05 is seven deviations off.
    b = 40_000
    estimator = SAMPLING[name](b, chunk=10_000)
    a = ravel(fm.ITD().vjp(net(fm.ITD(), steps=2), V, None)[0])
    answer = ravel(estimator.vjp(net(estimator, steps=2), V, None)[0])
    assert abs(float(answer @ a / (a @ a)) - 1) < 5 * (2 / b) ** 0.5
    assert ((answer - a).abs() < 5 * ((a @ a + a**2) / b) ** 0.5).all()


def affine(response: fm.BestResponse) -> fm.Solved:
    """Y_1 = Bx for a random 3 × 4 matrix B."""
    problem = quadratic(torch.zeros(3).double(), {"x": torch.zeros(4).double()}, seed=3)
    return solved(lambda y, x: -y @ (problem.b["x"] @ x["x"]), torch.zeros(3).double(), problem.inputs, response, steps=1)


@pytest.mark.parametrize(("name", "entries"), [("forward gradient", 3), ("perturbed solve", 5), ("central signs", 3)])
def test_the_variance_is_what_is_said(name: str, entries: int) -> None:
    # E ‖answer − a‖² is (N ± 1)‖a‖²/b, here with N = 4. One draw's square error deviates by 0.95 of its mean for signs and
    # by 1.8 for Gaussian directions, so 200 means lie within 20 % and 45 % at three and a half deviations; 16 samples
    # together deviate less.
    v = torch.tensor([1.0, -2.0, 0.5]).double()
    a = ravel(fm.ITD().vjp(affine(fm.ITD()), v, None)[0])
    at = affine(SAMPLING[name](1))
    for b in (1, 16):
        errors = [_tree.norm(_tree.subtract(SAMPLING[name](b, seed=s).vjp(at, v, None)[0], {"x": a})) for s in range(200)]
        mean = float(torch.stack(errors).square().mean() / (a @ a))
        assert mean == pytest.approx(entries / b, rel=0.3 if entries == 3 else 0.45)


@pytest.mark.parametrize("central", [False, True])
def test_the_difference_is_of_the_order_that_is_said(central: bool) -> None:
    # One step of rate 1 from 0 on −y eˣ gives y = eˣ; with the sign r the forward difference is (e^{x + rμ} − eˣ)/rμ, the
    # central one eˣ sinh(μ)/μ.
    x, v, off = torch.tensor(0.3, dtype=torch.float64), torch.tensor(2.0).double(), []
    for mu in (0.1, 0.05):
        estimator = fm.PerturbedSolve(1, scale=mu, distribution="rademacher", central=central)
        at = solved(lambda y, x: -y * torch.exp(x["x"]), torch.zeros(()).double(), {"x": x}, estimator, steps=1)
        answer = estimator.vjp(at, v, None)[0]["x"]
        slopes = [math.sinh(mu) / mu] if central else [math.expm1(step) / step for step in (mu, -mu)]
        assert min(abs(float(answer) - 2 * math.exp(0.3) * slope) for slope in slopes) < 1e-14 / mu
        off.append(abs(float(answer) - 2 * math.exp(0.3)))
    assert off[0] / off[1] == pytest.approx(4 if central else 2, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("central", [False, True])
def test_the_step_suits_the_coarsest_dtype(central: bool, dtype: torch.dtype) -> None:
    seen = []

    def loss(y: torch.Tensor, x: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(_tree.detach(x))
        return (y * x["x"].sum()).sum() + x["z"].sum()

    inputs = {"x": torch.full((2,), 3.0).double(), "z": torch.full((2,), 4.0, dtype=dtype)}
    estimator = fm.PerturbedSolve(1, distribution="rademacher", central=central, chunk=1)
    at = solved(loss, torch.zeros(2).double(), inputs, estimator, steps=1)
    seen.clear()
    estimator.vjp(at, torch.ones(2).double(), None)
    # ‖μu‖ = ε^(1/2 or 1/3) (1 + ‖x‖), of which x holds a half of the square.
    moved = torch.finfo(dtype).eps ** (1 / 3 if central else 1 / 2) * (1 + 50**0.5) / 2
    assert [float((s["x"] - 3.0).abs().max()) for s in seen] == pytest.approx([moved] * (2 if central else 1), rel=1e-6)


@pytest.mark.parametrize("name", SAMPLING)
def test_draws_repeat_and_differ(name: str) -> None:
    at = net(SAMPLING[name](1))

    def answer(at: fm.Solved = at, **fields: object) -> torch.Tensor:
        return ravel(SAMPLING[name](6, **fields).vjp(at, V, None)[0])

    generator, first = torch.get_rng_state(), answer()
    assert torch.equal(generator, torch.get_rng_state())
    torch.rand(1)
    assert bits(answer()) == bits(first)
    for other in (answer(seed=1), answer(replace(at, seed=at.seed + 1))):
        assert float(torch.linalg.vector_norm(other - first)) > 1e-3 * float(torch.linalg.vector_norm(first))
    for chunk in (1, 4, 100):  # how many are mapped together changes rounding alone, which 1/μ enlarges
        assert_agrees(answer(chunk=chunk), first, relative=1e-10 if name == "forward gradient" else 1e-6)


@pytest.mark.parametrize("name", SAMPLING)
def test_outer_steps_draw_anew_and_hypergradients_repeat(name: str) -> None:
    p = program(SAMPLING[name](3), torchopt.adam(0.1))
    state = p.init(start())
    batches = {"y": BATCHES[0]}
    first = p.hypergradient(state, batches, of="x")
    assert bits(p.hypergradient(state, batches, of="x")) == bits(first)
    moved, _ = p.step(state, batches)
    back = replace(moved, params=state.params, optimizer=state.optimizer)
    assert not torch.equal(p.hypergradient(back, batches, of="x"), first)


@pytest.mark.parametrize("name", SAMPLING)
def test_random_losses_draw_the_same_for_every_sample(name: str) -> None:
    def loss(y: torch.Tensor, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return ((torch.nn.functional.dropout(y, 0.5) - x["x"] * torch.rand(4)) ** 2).sum() / 2

    inputs, v = {"x": torch.ones(4).double()}, torch.ones(4).double()
    at = solved(loss, torch.ones(4).double(), inputs, SAMPLING[name](1), torchopt.sgd(0.1), steps=3)
    assert_agrees(
        SAMPLING[name](5).vjp(at, v, None)[0], ravel(SAMPLING[name](5, chunk=1).vjp(at, v, None)[0]), relative=1e-6
    )


@pytest.mark.parametrize("name", SAMPLING)
def test_mapped_programs_share_their_draws(name: str) -> None:
    def loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((y - x) ** 2).sum() / 2 + 0.1 * (y**4).sum()

    program = fm.Multilevel(
        fm.Level("y", loss, torchopt.adam(0.1), steps=4, response=SAMPLING[name](3)),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
    )
    points = torch.stack([vector_like(torch.zeros(3).double(), i) for i in range(3)])
    state = program.init({"y": torch.zeros(3).double(), "x": points[0]})

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return program.hypergradient(replace(state, params={**state.params, "x": x}), {}, of="x")

    mapped = torch.func.vmap(gradient)(points)
    for row, point in zip(mapped, points, strict=True):
        assert_agrees(row, gradient(point), relative=1e-12 if name == "forward gradient" else 1e-5)
    # In argmin the draws follow the point where values can be read; under a map the seed alone decides.
    solve = fm.argmin(loss, torchopt.adam(0.1), steps=4, response=SAMPLING[name](3))
    mapped = torch.func.vmap(torch.func.grad(lambda x: torch.sin(solve(torch.zeros(3).double(), x)).sum()))(points)
    assert torch.isfinite(mapped).all()
    at, estimator = affine(SAMPLING[name](1)), SAMPLING[name](1)
    with pytest.raises(fm.EstimatorError, match="cannot be differentiated again"):
        torch.func.grad(lambda x: estimator.vjp(replace(at, inputs={"x": x}), at.params, None)[0]["x"].sum())(at.inputs["x"])


@pytest.mark.parametrize(
    "response", [fm.ForwardGradient(9), *(fm.PerturbedSolve(9, distribution="rademacher", central=c) for c in (False, True))]
)
def test_a_fixed_point_that_is_not_reached_yet(response: fm.BestResponse) -> None:
    # Four steps y ← y/2 + x give y₀/16 + 15x/8. With signs the answer is 15/8, and at most 1/16 more or less if the start is
    # probed too.
    root = fm.fixed_point(lambda y, x: y / 2 + x, steps=4, response=response)
    answer = torch.func.grad(lambda x: root(torch.zeros(()).double(), x))(torch.ones(()).double())
    assert abs(float(answer) - 15 / 8) <= 1 / 16 + 1e-6


@pytest.mark.parametrize("name", SAMPLING)
def test_zero_cotangents_give_zero_even_beside_infinities(name: str) -> None:
    at = solved(
        lambda y, x: (y * torch.sqrt(x["x"])).sum(), torch.zeros(2), {"x": torch.zeros(2)}, SAMPLING[name](1), steps=1
    )
    answer, _, _ = SAMPLING[name](3).vjp(at, torch.zeros(2), None)
    assert torch.equal(answer["x"], torch.zeros(2))
    answer, _, _ = SAMPLING[name](3).vjp(net(SAMPLING[name](1)), _tree.map(lambda x: x + torch.nan, V), None)
    assert torch.isnan(ravel(answer)).all()


def test_stats_are_those_of_the_work_that_was_done() -> None:
    at = net(fm.ForwardGradient(1), steps=5)
    assert fm.ForwardGradient(3).vjp(at, V, None)[2] == fm.Stats(steps=15)
    assert fm.PerturbedSolve(3).vjp(at, V, None)[2] == fm.Stats(replayed=15, gradients=15)
    assert fm.PerturbedSolve(3, central=True).vjp(at, V, None)[2] == fm.Stats(replayed=30, gradients=30)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_level_without_inner_steps_is_refused(name: str) -> None:
    at = solved(lambda y, x: (y * x["x"]).sum(), torch.zeros(2), {"x": torch.ones(2)}, fm.ITD())
    with pytest.raises(fm.EstimatorError, match=r"follows the inner steps, but none were made .*; use AID"):
        SAMPLING[name](1).vjp(at, torch.ones(2), None)


def test_an_operation_without_a_forward_derivative_is_named() -> None:
    def loss(y: torch.Tensor, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cdist(y[None] * x["x"], torch.ones(1, 2)).sum()

    at = solved(loss, torch.zeros(2), {"x": torch.ones(2)}, fm.ForwardGradient(1), steps=1)
    with pytest.raises(fm.EstimatorError, match=r"no forward-mode derivative .*; use what takes none: .* PerturbedSolve"):
        fm.ForwardGradient(2).vjp(at, torch.ones(2), None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.ForwardGradient(0), r"ForwardGradient\(samples=0\): expected an integer of at least 1"),
        (lambda: fm.ForwardGradient(1, seed=0.5), r"seed=0.5\): expected an integer"),
        (lambda: fm.ForwardGradient(1, chunk=0), r"chunk=0\): expected an integer of at least 1"),
        (lambda: fm.PerturbedSolve(True), r"PerturbedSolve\(samples=True\): expected an integer"),
        (lambda: fm.PerturbedSolve(1, scale=0.0), r"scale=0.0\): expected a positive number, or None"),
        (lambda: fm.PerturbedSolve(1, scale=torch.inf), r"scale=inf\): expected a positive number"),
        (lambda: fm.PerturbedSolve(1, distribution="cauchy"), r"distribution='cauchy'\): expected 'gaussian' or"),
        (lambda: fm.PerturbedSolve(1, central=2), r"central=2\): expected True or False"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        make()
