"""Every estimator in the registry against closed forms, on every tree structure."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import Operator, ravel, unravel
from tests.oracles import assert_agrees, bits, dense_implicit, fingerprint
from tests.programs import BATCHES, SGD, program, start
from tests.registry import (
    COMPUTED,
    DIFFERENCE,
    ESTIMATORS,
    RELATIVE,
    STRUCTURES,
    Quadratic,
    quadratic,
    solved,
    structures,
    vector_like,
)

CONDITION = 3.0
STEPS = 60
# The ways to the same derivative of the unrolled steps are held to the first of them, on a few steps: see test_itd.py.
CONVERGING = [name for name in COMPUTED if name == "itd" or not name.startswith("itd")]


def at_solution(problem: Quadratic, estimator: fm.BestResponse, steps: int = STEPS) -> fm.Solved:
    if estimator.claims.target == "unrolled":
        return solved(problem.loss, problem.params, problem.inputs, estimator, steps=steps)
    return solved(problem.loss, problem.solution(), problem.inputs, estimator)


def target(problem: Quadratic, estimator: fm.BestResponse, v: object) -> dict[str, torch.Tensor]:
    if estimator.claims.target in {"identity", "step"}:  # the step is gradient descent's with rate 1
        return {name: b.T @ ravel(v).double() for name, b in problem.b.items()}
    return problem.response(v)


def size(problem: Quadratic, v: object, name: str = "x") -> float:
    """The norm of the terms that B_iᵀ A⁻¹ v is a sum of: ‖B_i‖ ‖v‖ (and A⁻¹ ≤ 3 beside it)."""
    return float(torch.linalg.matrix_norm(problem.b[name]) * _tree.norm(v))


def in_double(tree: object) -> object:
    return _tree.map(torch.Tensor.double, tree)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CONVERGING)
def test_closed_form_for_several_inputs(name: str, structure: str) -> None:
    params = in_double(STRUCTURES[structure]())
    inputs = {"x": torch.zeros(3).double(), "z": in_double(STRUCTURES["nested"]())}
    problem = quadratic(params, inputs, seed=1, condition=CONDITION)
    estimator = ESTIMATORS[name](problem.top, _tree.size(params))
    v = vector_like(params, seed=2)
    answers, _, stats = estimator.vjp(at_solution(problem, estimator), v, estimator.init(params))
    assert set(answers) == {"x", "z"}
    for key, reference in target(problem, estimator, v).items():
        assert _tree.mismatch(inputs[key], answers[key]) is None
        assert_agrees(answers[key], reference, relative=RELATIVE[name], size=size(problem, v, key))
    assert stats.hvps + stats.gradients + stats.steps + stats.replayed > 0 or not _tree.size(params)


@given(params=structures(), x=structures(), seed=st.integers(0, 2**20), condition=st.sampled_from([1.0, CONDITION]))
@pytest.mark.parametrize("name", CONVERGING)
def test_closed_form_on_random_trees(name: str, params: object, x: object, seed: int, condition: float) -> None:
    problem = quadratic(params, {"x": x}, seed, condition)
    estimator = ESTIMATORS[name](problem.top, _tree.size(params))
    v = vector_like(params, seed + 1)
    answers, _, _ = estimator.vjp(at_solution(problem, estimator), v, None)
    assert_agrees(answers["x"], target(problem, estimator, v)["x"], relative=RELATIVE[name], size=size(problem, v))


@given(params=structures((torch.float32, torch.float64, torch.bfloat16)), seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_dtypes_are_kept(name: str, params: object, seed: int) -> None:
    inputs = {"x": {"a": torch.zeros(2, dtype=torch.float32), "b": torch.zeros((), dtype=torch.float64)}}
    problem = quadratic(params, inputs, seed)
    estimator = ESTIMATORS[name](problem.top, _tree.size(params))

    def loss(y: object, x: dict[str, object]) -> torch.Tensor:
        # In float32 whatever the leaves are, as autocast would.
        pull = sum((problem.b[n].float().sum(0) @ ravel(tree).float() for n, tree in x.items()), torch.zeros(()))
        return sum((leaf.float() ** 2).sum() - leaf.float().sum() * pull for leaf in _tree.leaves(y)) + 0.0 * pull

    at = solved(loss, problem.params, problem.inputs, estimator, steps=2 if estimator.claims.target == "unrolled" else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)  # a series of scale 1 diverges on this Hessian, and says so
        answers, _, _ = estimator.vjp(at, vector_like(params, seed), estimator.init(params))
    assert _tree.mismatch(problem.inputs, answers) is None
    assert _tree.finite(answers)


@pytest.mark.parametrize("name", CONVERGING)
def test_float32_has_float32_accuracy(name: str) -> None:
    double = quadratic(in_double(STRUCTURES["dict"]()), {"x": torch.zeros(3).double()}, seed=4)
    estimator = ESTIMATORS[name](double.top, 6)
    params, x = _tree.map(torch.Tensor.float, double.params), {"x": double.inputs["x"].float()}
    a, b = double.a.float(), double.b["x"].float()

    def loss(y: object, inputs: dict[str, object]) -> torch.Tensor:
        flat = ravel(y)
        return 0.5 * flat @ (a @ flat) - flat @ (b @ inputs["x"])

    trajectory = estimator.claims.target == "unrolled"
    at = _tree.map(torch.Tensor.float, double.params if trajectory else double.solution())
    v = vector_like(params, seed=5)
    answers, _, _ = estimator.vjp(solved(loss, at, x, estimator, steps=STEPS if trajectory else 0), v, None)
    # float32's ε = 1.2e-7 times cond = 3 and a few dozen operations; the central difference loses half the digits, √ε.
    relative = 5e-3 if RELATIVE[name] >= DIFFERENCE else 2e-5
    reference = target(double, estimator, in_double(v))["x"]
    assert answers["x"].dtype == torch.float32
    assert_agrees(answers["x"].double(), reference, relative=relative, size=size(double, v))


@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_linear_in_the_cotangent_and_repeatable(name: str, seed: int) -> None:
    params = in_double(STRUCTURES["nested"]())
    problem = quadratic(params, {"x": torch.zeros(4).double()}, seed)
    estimator = ESTIMATORS[name](problem.top, _tree.size(params))
    at = at_solution(problem, estimator, steps=2)
    u, v = vector_like(params, seed), vector_like(params, seed + 1)

    def answer(cotangent: object) -> torch.Tensor:
        return estimator.vjp(at, cotangent, None)[0]["x"]

    both = answer(_tree.add_scaled(u, -3.0, v))
    terms = size(problem, u) + 3.0 * size(problem, v)
    # The forward gradient's terms are ⟨v, Jr⟩ r, √N longer than Jᵀv.
    relative = DIFFERENCE if name == "perturbed solve" else 4 * RELATIVE[name]
    assert_agrees(both, answer(u) - 3.0 * answer(v), relative=3 * relative, size=terms)
    assert bits(answer(u)) == bits(answer(u))
    zero = answer(_tree.zeros_like(u))
    assert torch.equal(zero, torch.zeros(4).double())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_handed_in_is_changed(name: str) -> None:
    params = in_double(STRUCTURES["nested"]())
    problem = quadratic(params, {"x": torch.zeros(4).double()}, seed=5)
    estimator = ESTIMATORS[name](problem.top, _tree.size(params))
    at, v = at_solution(problem, estimator, steps=2), vector_like(params, seed=3)
    before = fingerprint((at.params, at.inputs, at.opt_state, v, problem.params, problem.inputs))
    estimator.vjp(at, v, None)
    assert fingerprint((at.params, at.inputs, at.opt_state, v, problem.params, problem.inputs)) == before


def tanh_net(y: dict[str, torch.Tensor], inputs: dict[str, object]) -> torch.Tensor:
    """A small non-convex net whose inputs are per-example weights and a log regularizer."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    labels = torch.randn(6, generator=generator, dtype=torch.float64)
    hidden = torch.tanh(data @ y["w"] + y["b"])
    losses = (hidden @ y["out"] - labels) ** 2
    decay = sum((leaf**2).sum() for leaf in y.values())
    return (torch.sigmoid(inputs["weights"]) * losses).mean() + torch.exp(inputs["log_decay"]) * decay


@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", ["cg", "direct"])
def test_implicit_formula_on_a_non_convex_net(name: str, seed: int) -> None:
    shapes = {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2).double(), "out": torch.zeros(2).double()}
    y = _tree.scale(0.3, vector_like(shapes, seed))
    inputs = {"weights": vector_like(torch.zeros(6).double(), seed + 1), "log_decay": torch.zeros(()).double()}
    estimator = {"cg": fm.AID(fm.CG(60, tol=1e-14)), "direct": fm.AID(fm.Direct())}[name]
    v = vector_like(shapes, seed + 2)
    at = solved(tanh_net, y, inputs, estimator)
    if name == "cg":  # the dense solve takes an indefinite Hessian; conjugate gradient needs a positive one
        hessian = torch.func.jacrev(torch.func.grad(lambda flat: at.loss(unravel(flat, y), inputs)))(ravel(y))
        assume(torch.linalg.eigvalsh(hessian)[0] > 0.05)
    answers, _, stats = estimator.vjp(at, v, None)
    assert stats.converged
    for key, reference in dense_implicit(tanh_net, y, inputs, v).items():
        assert_agrees(answers[key], reference, relative=1e-8)


def test_zero_and_indefinite_curvature_have_defined_answers() -> None:
    inputs = {"x": torch.ones(2).double()}
    v = torch.tensor([1.0, 2.0]).double()
    flat = solved(lambda y, x: (y * x["x"]).sum(), torch.zeros(2).double(), inputs, fm.ITD())
    saddle = solved(lambda y, x: (y[0] ** 2 - y[1] ** 2) / 2 - (y * x["x"]).sum(), torch.zeros(2).double(), inputs, fm.ITD())
    for at in (flat, saddle):
        answers, _, stats = fm.AID(fm.CG(5)).vjp(at, v, None)
        assert bool(stats.negative_curvature)
        assert not bool(stats.converged)
        assert int(stats.iterations) == stats.hvps == 1
        assert torch.isfinite(answers["x"]).all()
        # Stopped at its first step, the solver answers with the identity inverse: w = v, and −∇²_xy g v = ∓v.
        assert torch.allclose(answers["x"].abs(), v)
    answers, _, stats = fm.AID(fm.Direct()).vjp(saddle, v, None)
    assert torch.allclose(answers["x"], torch.tensor([1.0, -2.0]).double())
    answers, _, stats = fm.AID(fm.Direct()).vjp(flat, v, None)
    assert torch.equal(answers["x"], torch.zeros(2).double())
    assert not bool(stats.converged)


def test_itd_without_steps_is_refused() -> None:
    at = solved(lambda y, x: (y * x["x"]).sum(), torch.zeros(2), {"x": torch.ones(2)}, fm.ITD())
    with pytest.raises(fm.EstimatorError, match="none were made"):
        fm.ITD().vjp(at, torch.ones(2), None)


@pytest.mark.parametrize("scale", [0.01, 1e-4])
def test_finite_difference_takes_the_step_it_is_given(scale: float) -> None:
    # ∂g/∂x = y³, so the central difference along v is −(3y²v + ε²v³), with ε = c/‖v‖.
    y, v = torch.tensor([0.7]).double(), torch.tensor([2.0]).double()
    at = solved(lambda y, x: (x["x"] * y**3).sum(), y, {"x": torch.ones(1).double()}, fm.ITD())
    answers, _, stats = fm.FiniteDifference(scale=scale).vjp(at, v, None)
    expected = -(3 * y**2 * v + (scale / 2) ** 2 * v**3)
    assert torch.allclose(answers["x"], expected, rtol=1e-8)
    assert stats.gradients == 2


@pytest.mark.parametrize("inputs_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("params_dtype", [torch.float64, torch.float32])
def test_the_difference_step_suits_the_coarsest_dtype(params_dtype: torch.dtype, inputs_dtype: torch.dtype) -> None:
    a = vector_like(torch.zeros(5, 5).double(), 0)

    def loss(y: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.tanh(a.to(y.dtype) @ y) * torch.exp(inputs["x"].to(y.dtype))).sum()

    y, x, v = torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 5), torch.linspace(0.5, 1, 5)
    at = solved(loss, y.to(params_dtype), {"x": x.to(inputs_dtype)}, fm.FiniteDifference())
    answers, _, _ = fm.FiniteDifference().vjp(at, v.to(params_dtype), None)
    # ∂g/∂x_i = tanh(a_i y) exp(x_i), so −∇²_xy g v = −exp(x) (1 − tanh²) (a v).
    slope = 1 - torch.tanh(a @ y.double()) ** 2
    expected = -torch.exp(x.to(inputs_dtype).double()) * slope * (a @ v.double())
    # A central difference loses half the digits of the coarsest dtype.
    relative = 4 * torch.finfo(inputs_dtype).eps ** 0.5
    assert answers["x"].dtype == inputs_dtype
    assert_agrees(answers["x"].double(), expected, relative=relative)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_size_of_the_cotangent_does_not_matter_to_the_difference(size: float) -> None:
    at = solved(lambda y, x: (x["x"] * y**2).sum(), torch.tensor([1.0, 2.0]), {"x": torch.ones(2)}, fm.FiniteDifference())
    answers, _, _ = fm.FiniteDifference().vjp(at, size * torch.tensor([1.0, 1.0]), None)
    assert torch.allclose(answers["x"] / size, torch.tensor([-2.0, -4.0]), rtol=1e-2)


def test_stats_are_those_of_the_work_that_was_done() -> None:
    h = torch.tensor([1.0, 2.0, 5.0]).double()
    inputs, v = {"x": torch.ones(3).double()}, torch.tensor([1.0, -1.0, 2.0]).double()
    at = solved(lambda y, x: (h * y**2).sum() / 2 - (y * x["x"]).sum(), torch.zeros(3).double(), inputs, fm.ITD())
    _, _, stats = fm.AID(fm.CG(2)).vjp(at, v, None)
    reference = fm.CG(2).solve(Operator(lambda u: h * u, like=v), v)
    stats = stats.plain()
    assert (stats.hvps, stats.gradients, stats.steps, stats.iterations) == (2, 1, 0, 2)
    assert stats.residual == pytest.approx(float(reference.residual), rel=1e-12)
    assert (stats.converged, stats.negative_curvature) == (False, False)
    at = solved(lambda y, x: ((y - x["x"]) ** 2).sum(), torch.zeros(3).double(), inputs, fm.ITD(), SGD, steps=4)
    assert fm.ITD().vjp(at, v, None)[2] == fm.Stats(steps=4)
    assert fm.Stats(steps=4)["steps"] == 4
    with pytest.raises(KeyError, match="'plain' is no statistic; there are hvps"):
        fm.Stats()["plain"]


def test_a_solver_is_told_that_the_hessian_is_symmetric() -> None:
    seen = []

    class Spy(fm.LinearSolver):
        def compute(self, operator, prepared, rhs, start):
            seen.append(operator)
            return fm.Direct().solve(operator, rhs)

    p = program(fm.AID(Spy()))
    p.hypergradient(p.init(start()), {"y": BATCHES[0]}, of="x")
    (operator,) = seen
    assert operator.symmetric
    assert _tree.mismatch(start()["y"], operator.like) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_difference_chooses_its_step(dtype: torch.dtype) -> None:
    # ‖εv‖ = √ε_m (1 + ‖y‖), for the machine epsilon of the coarsest leaf.
    y = [torch.full((2,), 30.0).double(), torch.full((1,), 40.0, dtype=dtype)]
    v = [torch.full((2,), 2.0).double(), torch.full((1,), 4.0, dtype=dtype)]
    seen = []

    def loss(at, x):
        seen.append(at[0].detach())
        return (at[0] * x["x"]).sum()

    fm.FiniteDifference().vjp(solved(loss, y, {"x": torch.ones(2).double()}, fm.ITD()), v, None)
    norm_y, norm_v = (2 * 30.0**2 + 40.0**2) ** 0.5, (2 * 2.0**2 + 4.0**2) ** 0.5
    moved = torch.finfo(dtype).eps ** 0.5 * (1 + norm_y) * 2.0 / norm_v
    assert torch.allclose(seen[0] - y[0], torch.full((2,), moved).double(), rtol=1e-5)
    assert torch.allclose(y[0] - seen[1], torch.full((2,), moved).double(), rtol=1e-5)
