"""The oracles: each against closed forms and against the others, and each against faults that it must see."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel, unravel
from funcmlo.testing.brute_force import unrolled
from funcmlo.testing.complexified import complex_step
from funcmlo.testing.dense import dense_implicit
from funcmlo.testing.differences import finite_difference
from funcmlo.testing.quadratic import Quadratic
from funcmlo.testing.subjects import func_grad
from funcmlo.testing.taylor import taylor_test
from tests.hierarchies import CHAIN, NAMED, Hierarchy
from tests.oracles import bits
from tests.programs import BATCHES, program, start

TREE = {"w": torch.zeros(2, 2).double(), "b": torch.zeros(2).double()}
QUADRATICS = [
    Quadratic(seed=1),
    Quadratic(seed=2, condition=100.0),
    Quadratic(seed=3, condition=4.0, y_like=TREE, x_like={"a": torch.zeros(3).double()}),
]
FEEDS = {"y": lambda t: BATCHES[t]}


def off(a: object, b: object) -> float:
    """The largest difference, relative to the larger of one and the reference."""
    return float((ravel(a) - ravel(b)).abs().max() / ravel(b).abs().max().clamp(min=1.0))


def at(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- Multilevel.cost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("composition", ["paths", "nested"])
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.Direct())], ids=["itd", "aid"])
@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_cost_is_what_step_pays_to_the_bit(composition: str, name: str, response: fm.BestResponse) -> None:
    h = Hierarchy(NAMED[name], seed=1)
    p = h.program(composition, response=response, steps=2)
    state, _ = p.step(p.init(h.start(3)), {})
    before = bits(state)
    cost = p.cost(state, {}, of=h.names[-1])
    assert bits(state) == before
    assert torch.equal(cost, p.step(state, {})[1][h.names[-1]]["costs"][0])
    assert not cost.requires_grad


def test_cost_with_batches_starts_and_signs() -> None:
    p = program(fm.ITD(), init=lambda x: 2 * x)
    state = p.init(start())
    assert torch.equal(p.cost(state, FEEDS, of="x"), p.step(state, FEEDS)[1]["x"]["cost"])
    up = fm.Multilevel(p.levels[0], fm.Level("x", lambda x, y: -(y**2).sum() + x.sum(), torchopt.sgd(0.1), maximize=True))
    state = up.init(start())
    assert torch.equal(up.cost(state, FEEDS, of="x"), up.step(state, FEEDS)[1]["x"]["cost"])
    lower = p.levels[0].loss(2 * state.params["x"], state.params["x"], BATCHES[0])[0]
    assert torch.equal(p.cost(state, FEEDS, of="y"), lower)
    y = state.params["y"]
    assert torch.equal(p.cost(state, {}, of="x", solve=False), torch.sin(y).sum() + 0.1 * (state.params["x"] ** 2).sum())


def test_cost_records_nothing_and_lets_losses_take_gradients() -> None:
    grads = []

    def lower(y: Tensor, x: Tensor) -> Tensor:
        grads.append(x.requires_grad)
        return ((y - x) ** 2).sum()

    def upper(x: Tensor, y: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        return (g * y).sum()

    low = fm.Level("y", lower, torchopt.sgd(0.1), steps=3, response=fm.ITD())
    for composition in ("paths", "nested"):
        p = fm.Multilevel(low, fm.Level("x", upper, torchopt.sgd(0.1)), composition=composition)
        state = p.init({"y": torch.zeros(2), "x": torch.ones(2)})
        grads.clear()
        cost = p.cost(state, {}, of="x")
        assert grads == [False] * 3, composition
        assert torch.equal(cost, p.step(state, {})[1]["x"]["cost"])


def test_cost_refuses_what_hypergradient_refuses() -> None:
    p = program()
    state = p.init(start())
    with pytest.raises(fm.DefinitionError, match="no level is called 'z'"):
        p.cost(state, FEEDS, of="z")
    with pytest.raises(fm.BatchError, match="takes a batch"):
        p.cost(state, {}, of="x")
    with pytest.raises(fm.BatchError, match="is an iterator"):
        p.cost(state, {"y": iter(BATCHES)}, of="x")
    with pytest.raises(fm.ParameterError, match="expected the State"):
        p.cost({}, FEEDS, of="x")
    bad = _tree.map(lambda x: x * math.inf, state.params["x"])
    with pytest.raises(fm.NonFiniteError):
        p.cost(p.init({**state.params, "x": bad}), FEEDS, of="x")


# --- finite differences ----------------------------------------------------------------------------------------------

SMOOTH = {
    "sin": lambda x: torch.sin(x).sum(),
    "scaled": lambda x: (
        torch.sin(x / x.detach().abs().clamp(min=1e-12).mean()).sum() if x.abs().max() else torch.sin(x).sum()
    ),
    "cubic": lambda x: (x**3).sum() + x.sum(),
    "rational": lambda x: (x / (1 + x**2)).sum(),
    "linear": lambda x: 3 * x.sum(),
    "oscillating": lambda x: torch.sin(50 * x).sum(),
}
ROUGH = {
    "relu at": lambda x, p: torch.relu(x - p).sum(),
    "relu near": lambda x, p: (torch.relu(x - p + 1e-3 * p.abs()) + torch.relu(x - p + 1e-5)).sum() + torch.sin(x).sum(),
    "relu close": lambda x, p: torch.relu(x - p + 1e-8).sum(),
    "relu next": lambda x, p: torch.relu(x - p + 1e-10).sum() + x.sum(),
    "abs": lambda x, p: (x - p).abs().sum() + torch.exp(-(x**2)).sum(),
    "cancelling": lambda x, p: ((1e8 + torch.sin(x)) - 1e8).sum(),
    "float32": lambda x, p: torch.sin(x.float()).double().sum() + 1e-3 * x.sum(),
    "ripple": lambda x, p: (x * x).sum() + 1e-3 * torch.sin(1e3 * x).sum(),
    "offset": lambda x, p: 1e6 + torch.sin(x).sum(),
}


@pytest.mark.parametrize("point", [0.7, -1.3, 0.0, 1e-8, 1e-3, 3e3])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_are_differentiated_to_nearly_all_digits(name: str, point: float) -> None:
    x = at([point])
    (truth,) = func_grad(SMOOTH[name], x)
    if name == "scaled":  # its derivative as it is evaluated, with the scale held
        scale = max(abs(point), 1e-12) if point else 1.0
        estimate = finite_difference(lambda z: torch.sin(z / scale).sum(), x)
        truth = torch.cos(x[0] / scale) / scale
    else:
        estimate = finite_difference(SMOOTH[name], x)
    assert (estimate.value - truth).abs() <= estimate.error
    assert estimate.error <= 1e-7 * truth.abs()


def test_large_points_with_functions_of_their_scale() -> None:
    x = at([1e8, -2e8])
    estimate = finite_difference(lambda z: torch.sin(z / 1e8).sum() * 1e4, x)
    truth = torch.cos(x / 1e8) * 1e-4
    assert ((estimate.value - truth).abs() <= estimate.error).all()
    assert (estimate.error <= 1e-7 * truth.abs().max()).all()


@pytest.mark.parametrize("point", [0.7, -1.3, 0.0, 1e-8, 1e-3, 3e3])
@pytest.mark.parametrize("name", ROUGH)
def test_the_error_is_honest_where_the_function_is_not_smooth(name: str, point: float) -> None:
    p = at([point])
    truth = func_grad(lambda x: ROUGH[name](x, p), p)
    if name == "float32":
        truth = torch.cos(p) + 1e-3
        if abs(point) > 1e3:
            pytest.skip("x itself is rounded to float32 there, so the truth is another")
    value, error = finite_difference(lambda x: ROUGH[name](x, p), p)
    assert ((value - truth).abs() <= error).all()


def test_rounding_inside_a_function_is_seen_beside_what_is_not_rounded() -> None:
    """A float32 network with a float64 penalty: the smallest steps move the penalty alone, smoothly."""
    for point in torch.linspace(0.1, 2.0, 40, dtype=torch.float64):
        value, error = finite_difference(lambda x: torch.sin(x.float()).double() + torch.sin(x), point)
        assert abs(value - 2 * torch.cos(point)) <= error


def test_undefined_values_are_stepped_around_or_told() -> None:
    value, error = finite_difference(lambda x: torch.log(x).sum(), at([1e-3, 2.0]))
    assert ((value - at([1e3, 0.5])).abs() <= error).all()
    assert (error <= 1e-7 * value).all()
    assert not torch.isfinite(finite_difference(lambda x: torch.sqrt(x).sum(), at([-1.0])).error).any()


def test_trees_and_directions() -> None:
    x = {"w": torch.tensor([[1.0, 2.0]]), "b": (torch.tensor(3.0),)}

    def function(tree: dict) -> Tensor:
        return torch.sin(tree["w"]).sum() * tree["b"][0]

    value, error = finite_difference(function, x)
    truth = func_grad(function, _tree.map(Tensor.double, x))
    assert _tree.mismatch(truth, value) is None
    assert (ravel(value) - ravel(truth)).abs().le(ravel(error)).all()
    v = _tree.map(torch.ones_like, x)
    slope, bound = finite_difference(function, x, direction=v)
    assert slope.dim() == 0
    assert abs(slope - ravel(truth).sum()) <= bound <= 1e-9


def test_finite_difference_says_what_is_wrong() -> None:
    data = torch.ones(2, 2)
    with pytest.raises(fm.EstimatorError, match=r"failed on float64 numbers .* float32 data of its own"):
        finite_difference(lambda x: (data @ x).sum(), torch.ones(2))
    with pytest.raises(fm.ParameterError, match="direction="):
        finite_difference(lambda x: x.sum(), torch.zeros(5000))
    with pytest.raises(fm.ParameterError, match="direction and the point differ"):
        finite_difference(lambda x: x.sum(), torch.zeros(2), direction=torch.zeros(3))
    with pytest.raises(fm.ParameterError, match="expected a tree of floating-point"):
        finite_difference(lambda x: x.sum(), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(fm.LossError, match="expected a real 0-d tensor"):
        finite_difference(lambda x: x, torch.zeros(2))
    with pytest.raises(fm.ParameterError, match="takes a function, a Multilevel"):
        finite_difference(3, torch.zeros(2))
    p = program()
    with pytest.raises(fm.ParameterError, match="Say of="):
        finite_difference(p, p.init(start()), FEEDS)
    with pytest.raises(fm.ParameterError, match="takes it and state, batches, of="):
        finite_difference(p, p.init(start()), of="x")
    with pytest.raises(fm.ParameterError, match="cotangent and the solution differ"):
        finite_difference(_solve(), torch.zeros(3), torch.ones(3), torch.tensor(1.0), cotangent=torch.ones(2))


# --- the Taylor test -------------------------------------------------------------------------------------------------


def _random_function(seed: int) -> tuple[object, Tensor]:
    """A smooth function with curvature from 1e-3 to 1e3 of its gradient, at any scale of x and f, and where it is taken."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, ratio = draw.choice([1, 2, 5, 20, 100]), 10 ** draw.uniform(-3, 3)
    x, size = normal(n) * 10 ** draw.uniform(-4, 4), 10 ** draw.uniform(-3, 3)
    root, line, wave, offset = normal(n, n), normal(n), draw.choice([0.0, 1.0]), draw.choice([0.0, 1.0, 10.0])
    a, scale = (root + root.T) / math.sqrt(n), max(1.0, float(x.norm()))

    def function(y: Tensor) -> Tensor:
        d = (y - x) / scale
        waves = torch.sin(line @ d + 1) + ratio * torch.cos(2 * d).sum() / n
        return size * (offset + line @ d + 0.5 * ratio * d @ a @ d + wave * waves + 0.1 * torch.exp(-d @ d))

    return function, x


def _fault(gradient: Tensor, kind: int, seed: int) -> Tensor:
    u = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    largest = torch.zeros_like(gradient)
    largest[gradient.abs().argmax()] = gradient.norm()
    off_by = (gradient, gradient.norm() * u / u.norm(), largest, -gradient)[kind % 4]
    return gradient + 3e-4 * off_by


def _errors(seeds: range) -> tuple[list[int], list[int]]:
    wrong, missed = [], []
    for seed in seeds:
        function, x = _random_function(seed)
        gradient = func_grad(function, x)
        wrong += [seed] * (not taylor_test(function, x, gradient, seed=seed))
        missed += [seed] * bool(taylor_test(function, x, _fault(gradient, seed, seed), seed=seed))
    return wrong, missed


def test_right_gradients_pass_and_faults_of_3e_4_do_not() -> None:
    assert _errors(range(40)) == ([], [])


@pytest.mark.slow
def test_right_gradients_pass_and_faults_of_3e_4_do_not_at_length() -> None:
    assert _errors(range(1000, 1500)) == ([], [])


@pytest.mark.parametrize("kind", range(4))
def test_programs_with_a_fault_of_3e_4_fail(kind: int) -> None:
    p = program(fm.ITD())
    for seed in range(2):
        state = p.init(start(seed))
        gradient = p.hypergradient(state, FEEDS, of="x")
        assert taylor_test(p, state, FEEDS, of="x", seed=seed)
        assert not taylor_test(p, state, FEEDS, of="x", gradient=_fault(gradient, kind, seed), seed=seed)


def test_signs_and_factors_fail_and_the_numbers_are_told() -> None:
    x = at([0.3, -2.0])
    gradient = torch.cos(x)
    for wrong in (-gradient, 2 * gradient, 0 * gradient, gradient + 1e-4):
        test = taylor_test(lambda x: torch.sin(x).sum(), x, wrong)
        assert not test
        with pytest.raises(fm.EstimatorError, match=r"off by about .* Remainders by step: 1e-01: "):
            test.check()
    assert abs(taylor_test(lambda x: torch.sin(x).sum(), x, 1.01 * gradient).fault - 0.01) < 0.01
    with pytest.raises(fm.EstimatorError, match="off by about"):
        taylor_test(lambda x: torch.sin(x).sum(), x, -gradient, raise_on_failure=True)
    good = taylor_test(lambda x: torch.sin(x).sum(), x, gradient, raise_on_failure=True)
    assert good.check() is good
    assert good.slope >= 1.95
    assert len(good.remainders) == 3
    assert len(repr(good)) < 200


def test_a_tiny_gradient_fault_shows_in_the_slope() -> None:
    """A fault far below what differences are asked for: at h = 1e-5 the remainder is 1e-9 h beside a curvature of 1e-3."""
    x = torch.ones(3).double()
    a = at([1.0, 2.0, 3.0])
    assert taylor_test(lambda x: a @ x + 5e-4 * (x @ x), x, a + 1e-3 * x)
    test = taylor_test(lambda x: a @ x + 5e-4 * (x @ x), x, (a + 1e-3 * x) * (1 + 1e-7))
    assert not test
    assert "slope" in test.reason


def test_linear_functions_pass_and_stationary_points_too() -> None:
    x = at([1.0, 2.0])
    linear = taylor_test(lambda x: (at([3.0, -1.0]) * x).sum(), x)
    assert linear
    assert linear.slope is None
    assert not taylor_test(lambda x: (at([3.0, -1.0]) * x).sum(), x, at([3.0, -1.0]) * (1 + 3e-4))
    assert taylor_test(lambda y: ((y - x) ** 2).sum() + 1, x)
    assert not taylor_test(lambda y: ((y - x) ** 2).sum() + 1, x, at([1e-3, 0.0]))
    assert taylor_test(lambda y: (y - y).sum() + 1, x)


def test_noise_that_hides_the_answer_does_not_pass() -> None:
    draws = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return torch.sin(x).sum() + 1e-3 * torch.randn((), generator=draws, dtype=torch.float64)

    test = taylor_test(noisy, at([0.3, -2.0]), torch.cos(at([0.3, -2.0])))
    assert not test
    rounded = taylor_test(lambda x: torch.sin(x.half().float()).double().sum(), at([0.3, -2.0]), torch.cos(at([0.3, -2.0])))
    assert not rounded
    assert taylor_test(lambda x: torch.sin(x).sum(), at([0.3]), at([math.nan])).passed is False
    with pytest.raises(fm.ParameterError, match="the gradient and the point differ"):
        taylor_test(lambda x: x.sum(), at([1.0]), at([1.0, 2.0]))
    with pytest.raises(fm.ParameterError, match="directions=0"):
        taylor_test(lambda x: x.sum(), at([1.0]), directions=0)


def test_maximized_levels_are_tested_by_their_own_hypergradient() -> None:
    lower = program(fm.ITD()).levels[0]
    p = fm.Multilevel(lower, fm.Level("x", lambda x, y: torch.sin(y).sum() - (x**2).sum(), torchopt.sgd(0.1), maximize=True))
    state = p.init(start())
    gradient = p.hypergradient(state, FEEDS, of="x")
    assert taylor_test(p, state, FEEDS, of="x")
    assert taylor_test(p, state, FEEDS, of="x", gradient=gradient)
    assert off(finite_difference(p, state, FEEDS, of="x").value, -gradient) < 1e-9


# --- dense, unrolled and complex, against closed forms and one another -----------------------------------------------


@pytest.mark.parametrize("problem", QUADRATICS, ids=repr)
def test_all_oracles_agree_on_quadratics(problem: Quadratic) -> None:
    v = unravel(torch.randn(_tree.size(problem.start), generator=torch.Generator().manual_seed(0)).double(), problem.start)
    inputs, condition = {"x": problem.x}, problem.condition

    def loss(y: object, x: dict) -> Tensor:
        return problem.inner(y, x["x"])

    # A⁻¹ multiplies rounding by the condition; (1 − 1/condition)^T is left of the start.
    near = 1e-13 * condition
    assert off(dense_implicit(loss, problem.solution(), inputs, v)["x"], problem.response(v)) < near
    at_end = unrolled(loss, problem.start, inputs, v, optimizer=torchopt.sgd(1.0), steps=problem.steps)["x"]
    assert off(at_end, problem.response(v)) < 10 * near
    p = problem.program(fm.AID(fm.Direct()))
    state = problem.state(p)
    truth = problem.hypergradient()
    assert off(dense_implicit(p, state, {}, of="x"), truth) < near
    assert off(unrolled(p, problem.state(p, solved=False), {}, of="x"), truth) < 100 * near
    if condition < 4:
        value, error = finite_difference(p, state, {}, of="x")
        assert (ravel(value) - ravel(truth)).abs().le(ravel(error)).all()
        assert (ravel(error) <= 1e-7 * ravel(truth).abs().max()).all()
        assert off(complex_step(p, state, {}, of="x"), truth) < 100 * near
        assert taylor_test(p, state, {}, of="x", directions=1)


@pytest.mark.parametrize("init", [None, lambda x: 2 * x], ids=["warm", "init"])
@pytest.mark.parametrize(
    "optimizer",
    [torchopt.sgd(0.1, momentum=0.9), torchopt.adam(0.1), lambda x: torchopt.sgd(0.1 * torch.sigmoid(x[0]))],
    ids=["momentum", "adam", "learned"],
)
def test_unrolled_and_complex_steps_are_itd_on_bilevel_programs(optimizer: object, init: object) -> None:
    p = program(fm.ITD(), optimizer, init=init)
    state, _ = p.step(p.init(start(2), seed=5), FEEDS)
    itd = p.hypergradient(state, FEEDS, of="x")
    assert off(unrolled(p, state, FEEDS, of="x"), itd) < 1e-12
    if isinstance(optimizer, torchopt.base.GradientTransformation):
        assert off(complex_step(p, state, FEEDS, of="x"), itd) < 1e-12
    else:  # torchopt compares a rate with 0, which complex numbers do not bear
        with pytest.raises(fm.EstimatorError, match=r"does not take complex numbers \(in ge"):
            complex_step(p, state, FEEDS, of="x")
    assert off(finite_difference(p, state, FEEDS, of="x").value, itd) < 1e-9


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_unrolled_and_dense_on_hierarchies(name: str) -> None:
    h = Hierarchy(NAMED[name], seed=4)
    top = h.names[-1]
    values = h.start(1)
    values = {**values, **h.solve_below(top, values)}
    for composition in ("paths", "nested"):
        p = h.program(composition)
        truth = h.path_sum(p.graph, top, values) if composition == "paths" else h.total_gradient(top, values)
        assert off(dense_implicit(p, p.init(values), {}, of=top), truth) < 1e-13
    nested = h.program("nested", response=fm.ITD(), steps=2)
    state, _ = nested.step(nested.init(h.start(2)), {})
    once = h.program("paths", response=fm.ITD(), steps=1)
    for of in h.names[1:]:
        assert off(unrolled(nested, state, {}, of=of), nested.hypergradient(state, {}, of=of)) < 1e-12
        if once.graph.exact(of):
            assert off(unrolled(once, state, {}, of=of), once.hypergradient(state, {}, of=of)) < 1e-12
    value, error = finite_difference(nested, state, {}, of=top)
    assert (value - unrolled(nested, state, {}, of=top)).abs().le(error).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_dense_nested_sees_third_derivatives() -> None:
    """Three levels that are not quadratic: the lowest map's own curvature enters, and differences agree."""
    costs = {
        "a": lambda a, b: torch.cosh(a - torch.sin(b)).sum() + 0.1 * (a**4).sum(),
        "b": lambda b, a, c: ((b - c + 0.3 * torch.sin(a)) ** 2).sum() / 2 + 0.3 * torch.cos(a).sum(),
        "c": lambda c, b: (torch.sin(b) + c**2).sum(),
    }
    rate, aid = torchopt.sgd(0.5), fm.AID(fm.Direct())
    levels = [fm.Level(n, f, rate, steps=s, response=aid) for (n, f), s in zip(costs.items(), (12, 20, 1), strict=True)]
    p = fm.Multilevel(*levels, composition="nested")
    c = at([0.3, -0.2])
    state = p.init({"a": c, "b": c, "c": c})
    for _ in range(2):
        state = p.init({**p.step(state, {})[0].params, "c": c})
    v = at([1.0, 2.0])
    value, error = finite_difference(p, state, {}, of="c", direction=v)
    # Inner loops contract by 0.7 per step or faster, 40 steps in all: 1e-6 is left of the start's distance at most.
    assert abs(dense_implicit(p, state, {}, of="c") @ v - value) <= error + 1e-6
    paths = fm.Multilevel(*levels)
    assert abs(dense_implicit(paths, state, {}, of="c") @ v - value) > 1e-3


def _solve(response: fm.BestResponse | None = None) -> object:
    def loss(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
        return ((y - x.sin()) ** 2).sum() / 2 + r * (y**4).sum()

    return fm.argmin(loss, torchopt.sgd(0.4, momentum=0.1), steps=20, response=response or fm.ITD())


def test_all_oracles_on_argmin() -> None:
    solve, init, v = _solve(), at([0.5, 0.1, 1.0]), at([1.0, -2.0, 0.5])
    x, r = at([0.3, -0.7, 2.0]), at(0.2)
    grads = torch.func.grad(lambda x, r: v @ solve(init, x, r), argnums=(0, 1))(x, r)
    truth = dict(zip("xr", grads, strict=True))
    for oracle in (unrolled, complex_step):
        assert off(oracle(solve, init, x, r, cotangent=v), truth) < 1e-12
    y = solve(init, x, r)
    assert off(dense_implicit(solve, y, x, r, cotangent=v), truth) < 1e-4  # 20 steps of a contraction by about 0.6
    value, error = finite_difference(solve, init, x, r=r, cotangent=v)
    assert (ravel(value) - ravel(truth)).abs().le(ravel(error)).all()
    assert taylor_test(solve, init, x, r, cotangent=v, directions=1)
    for _ in range(4):
        y = solve(y, x, r)  # AID is right at a solution alone
    assert taylor_test(_solve(fm.AID(fm.Direct())), y, x, r, cotangent=v, directions=1)
    assert not taylor_test(solve, init, x, r, cotangent=v, directions=1, gradient=_tree.scale(1.0003, truth))


def test_all_oracles_on_fixed_points() -> None:
    def phi(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        return 0.3 * torch.sin(torch.roll(y, 1)) + batch * x

    solve = fm.fixed_point(phi, steps=60, response=fm.AID(fm.Direct()))
    init, x, batch, v = torch.zeros(3).double(), at([0.3, -0.7, 1.0]), at([1.0, 2.0, 3.0]), at([1.0, 0.0, -2.0])
    truth = torch.func.grad(lambda x: v @ solve(init, x, batch=batch))(x)
    for oracle in (unrolled, complex_step):
        assert off(oracle(solve, init, x, batch=batch, cotangent=v)["x"], truth) < 1e-12
    assert off(dense_implicit(solve, solve(init, x, batch=batch), x, batch=batch, cotangent=v)["x"], truth) < 1e-12
    value, error = finite_difference(solve, init, x, batch=batch, cotangent=v)
    assert (value["x"] - truth).abs().le(error["x"]).all()
    assert taylor_test(solve, init, x, batch=batch, cotangent=v)


def test_float32_programs_are_raised() -> None:
    p = program(fm.ITD())
    state = p.init(_tree.map(Tensor.float, start()))
    feeds = {"y": lambda t: BATCHES[t].float()}
    assert ravel(finite_difference(p, state, feeds, of="x").error).max() < 1e-9
    assert taylor_test(p, state, feeds, of="x")
    assert unrolled(p, state, feeds, of="x").dtype == torch.float64


def test_what_cannot_be_followed_is_refused_by_name() -> None:
    state = program().init(start())
    for fields, words in (({"warmup": 2}, "a warm-up of 2 updates"), ({"roll_back": True}, "roll_back=True")):
        p = program(fm.AID(fm.CG(5)), **fields)
        with pytest.raises(fm.EstimatorError, match=words):
            unrolled(p, state, FEEDS, of="x")
    closed = program(optimizer=fm.Solver(lambda y, x, batch: x - batch), steps=1)
    for oracle in (unrolled, complex_step):
        with pytest.raises(fm.EstimatorError, match="an outside Solver"):
            oracle(closed, state, FEEDS, of="x")
    with pytest.raises(fm.EstimatorError, match="singular"):
        dense_implicit(lambda y, x: y.sum() * x["x"], at([1.0]), {"x": at(1.0)}, at([1.0]))
    with pytest.warns(fm.FuncmloWarning):
        chain = Hierarchy(CHAIN, seed=1).program("paths")
    with pytest.raises(fm.EstimatorError, match="no level below them"):
        complex_step(chain, chain.init(Hierarchy(CHAIN, seed=1).start()), {}, of="p3")


# --- complex steps of plain functions --------------------------------------------------------------------------------


def test_complex_steps_are_exact_to_rounding() -> None:
    x = at([0.3, 1.2, 2.0])

    def function(x: Tensor) -> Tensor:
        return (torch.exp(torch.sin(x)) / (1 + x**2)).sum() + torch.log(x).prod() + torch.tanh(x @ x)

    truth = func_grad(function, x)
    assert off(complex_step(function, x), truth) < 1e-15 * 8  # a few operations, each exact to half an ulp
    v = at([1.0, -1.0, 2.0])
    assert abs(complex_step(function, x, v) - truth @ v) < 1e-14
    assert abs(complex_step(function, x, direction=v) - truth @ v) < 1e-14


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.abs().sum(), "calls abs"),
        (lambda x: torch.relu(x).sum(), "in relu"),
        (lambda x: x.max(), "in max"),
        (lambda x: x.norm(), "calls norm"),
        (lambda x: torch.linalg.vector_norm(x), "calls linalg_vector_norm"),
        (lambda x: (x.conj() * x * x).sum(), "calls conj"),
        (lambda x: (x.real**2).sum(), "calls real"),
    ],
)
def test_complex_steps_refuse_what_is_not_analytic(function: object, words: str) -> None:
    with pytest.raises(fm.EstimatorError, match=words):
        complex_step(function, at([-0.3, 0.7]))


def test_the_dense_formula_warns_where_a_level_is_not_solved() -> None:
    problem = fm.testing.Quadratic(condition=3.0)
    p = problem.program(fm.AID(fm.CG(5)))
    found = fm.testing.dense_implicit(p, problem.state(p), {}, of="x")
    assert float((found - problem.hypergradient()).norm()) <= 1e-12
    with pytest.warns(fm.FuncmloWarning, match=r"level 'y' is not at its solution, which a Newton step puts .* away"):
        fm.testing.dense_implicit(p, problem.state(p, solved=False), {}, of="x")


def test_the_taylor_test_is_not_fooled_by_overflow_or_by_far_kinks() -> None:
    x = torch.linspace(-1, 1, 4).double()
    for size in (1e150, 1e200):
        assert not fm.testing.taylor_test(lambda x, c=size: c * torch.sin(x).sum(), x, -size * x.cos()).passed
    for seed in range(10):
        at = torch.randn(20, generator=torch.Generator().manual_seed(seed)).double()
        right = (at > 0).double()
        assert fm.testing.taylor_test(lambda x: torch.relu(x).sum(), at, right).passed
        assert not fm.testing.taylor_test(lambda x: torch.relu(x).sum(), at, 1.001 * right).passed
