"""Faults that were found in public libraries of this field, one test each: no estimator in the registry has them.

Each test asks every estimator that the fault could touch, and is shown to bite on an estimator that has it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel, unravel
from tests.oracles import assert_agrees
from tests.registry import COMPUTED, ESTIMATORS, RELATIVE, Quadratic, quadratic, solved, vector_like

Make = Callable[[float, int], fm.BestResponse]

STEPS = 60
# 60 steps or terms leave (2/3)^60 of a quadratic of condition 3, as in tests/registry.py; the other ways of ITD to the
# same derivative are held to the first in tests/test_itd.py.
NAMES = [name for name in COMPUTED if name == "itd" or not name.startswith("itd")]
IMPLICIT = [name for name in NAMES if ESTIMATORS[name](1.0, 3).claims.target == "implicit"]
DIFFERENCES = ["finite difference", "sama"]


@dataclass(frozen=True)
class Planted(fm.BestResponse):
    """AID with a dense Hessian at y*, and a fault: how the system is solved, and at which y the cross term is taken."""

    solve: Callable[[Tensor, Tensor, Any], Tensor] = lambda a, v, tree: torch.linalg.solve(a, v)
    at_start: bool = False
    clean: bool = False

    def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
        def slope(y: Tensor, inputs: Any) -> Tensor:
            return ravel(torch.func.grad(lambda p: solved.loss(p, inputs))(unravel(y, solved.params)))

        y = ravel(solved.params)
        v = torch.nan_to_num(ravel(cotangent), 0.0) if self.clean else ravel(cotangent)
        w = self.solve(torch.func.jacrev(slope)(y, solved.inputs), v.to(y), solved.params)
        there = ravel(solved.init[0]) if self.at_start else y
        _, pull = torch.func.vjp(lambda inputs: slope(there, inputs), solved.inputs)
        return {name: -x for name, x in pull(w)[0].items()}, state, fm.Stats(hvps=1)


def planted(**faults: Any) -> Make:
    return lambda top, size: Planted(**faults)


def answers(make: Make, problem: Quadratic, v: object, scale: float = 1.0) -> tuple[Tensor, fm.BestResponse]:
    """Jᵀv by an estimator on the problem with its cost times `scale`, whose optimizer suits the curvature."""
    top = scale * problem.top
    estimator = make(top, _tree.size(problem.params))
    unrolled = estimator.claims.target == "unrolled"
    at, steps = (problem.params, STEPS) if unrolled else (problem.solution(), 0)
    at = _tree.map(lambda x, like: x.to(like.dtype), at, problem.params)
    optimizer = torchopt.sgd(1.0 / top)

    def loss(y: object, inputs: dict[str, object]) -> Tensor:
        return scale * problem.loss(y, inputs)

    inner = solved(loss, at, problem.inputs, estimator, optimizer, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        products, _, _ = estimator.vjp(inner, v, estimator.init(problem.params))
    return products["x"], estimator


def target(problem: Quadratic, estimator: fm.BestResponse, v: object, scale: float = 1.0) -> Tensor:
    """Jᵀv; scale · Bᵀv where H⁻¹ is taken to be I; Bᵀv / ‖A‖ for one step of rate 1 / (scale ‖A‖)."""
    if estimator.claims.target == "identity":
        return scale * (problem.b["x"].T @ ravel(v).double())
    if estimator.claims.target == "step":
        return problem.b["x"].T @ ravel(v).double() / problem.top
    return problem.response(v)["x"]


def holds(make: Make, relative: float, problem: Quadratic, scale: float = 1.0) -> None:
    v = vector_like(problem.params, seed=2)
    given, estimator = answers(make, problem, v, scale)
    size = torch.linalg.matrix_norm(problem.b["x"]) * _tree.norm(v)
    identity = estimator.claims.target == "identity"
    assert_agrees(given, target(problem, estimator, v, scale), relative=relative, size=size * (scale if identity else 1))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


# A conjugate gradient whose scale goes into its step and not into its residual


def scaled_on_both_sides(make: Make, relative: float) -> None:
    """J does not change when the cost is scaled."""
    for scale in (0.1, 10.0):
        holds(make, 10 * relative, quadratic(zeros(4), {"x": zeros(3)}, seed=1), scale)


def one_sided(a: Tensor, v: Tensor, tree: Any, scale: float = 0.1) -> Tensor:
    del tree
    w, r, p = torch.zeros_like(v), v, v
    for _ in range(len(v)):
        length = (r @ r) / (scale * (p @ a @ p))
        following = r - length * (a @ p)
        w, p, r = w + length * p, following + (following @ following) / (r @ r) * p, following
    return scale * w


@pytest.mark.parametrize("name", NAMES)
def test_cg_is_scaled_on_both_sides(name: str) -> None:
    scaled_on_both_sides(ESTIMATORS[name], RELATIVE[name])


def test_a_cg_that_is_scaled_on_one_side_is_seen() -> None:
    scaled_on_both_sides(planted(), 1e-10)
    with pytest.raises(AssertionError, match="off by"):
        scaled_on_both_sides(planted(solve=one_sided), 1e-2)


# A conjugate gradient whose next direction is made of the residual before its update


def stale(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    del tree
    w, r, p = torch.zeros_like(v), v, v
    for _ in range(len(v)):
        length = (r @ r) / (p @ a @ p)
        following = r - length * (a @ p)
        w, p, r = w + length * p, r + (following @ following) / (r @ r) * p, following
    return w


@pytest.mark.parametrize("name", IMPLICIT)
def test_the_residual_of_a_direction_is_not_stale(name: str) -> None:
    holds(ESTIMATORS[name], RELATIVE[name], quadratic(zeros(6), {"x": zeros(3)}, seed=3))


def test_a_stale_residual_is_seen() -> None:
    with pytest.raises(AssertionError, match="off by"):
        holds(planted(solve=stale), 1e-2, quadratic(zeros(6), {"x": zeros(3)}, seed=3))


# A conjugate gradient that stops before it has updated its iterate, or goes on after convergence to 0/0


def twice_the_identity(make: Make, relative: float) -> None:
    problem = quadratic(zeros(4), {"x": zeros(3)}, seed=1)
    holds(make, relative, Quadratic(2 * torch.eye(4).double(), problem.b, problem.params, problem.inputs))


def late(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    del tree
    w, r, p = torch.zeros_like(v), v, v
    for _ in range(len(v)):
        length = (r @ r) / (p @ a @ p)
        following = r - length * (a @ p)
        if following.norm() < 1e-10:
            break
        w, p, r = w + length * p, following + (following @ following) / (r @ r) * p, following
    return w


def unstopped(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    return one_sided(a, v, tree, scale=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_cg_returns_the_converged_iterate_on_twice_the_identity(name: str) -> None:
    twice_the_identity(ESTIMATORS[name], RELATIVE[name])


@pytest.mark.parametrize("fault", [late, unstopped])
def test_a_cg_that_stops_early_or_never_is_seen(fault: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        twice_the_identity(planted(solve=fault), 1e-2)


# An inverse that keeps only the Hessian's diagonal blocks


def coupled(make: Make, relative: float) -> None:
    tree = {"a": zeros(2, 2), "b": zeros(3), "c": zeros(1)}
    holds(make, relative, quadratic(tree, {"x": zeros(3)}, seed=1))


def blocks_only(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    ends = [0, *torch.tensor([x.numel() for x in _tree.leaves(tree)]).cumsum(0).tolist()]
    return torch.cat([torch.linalg.solve(a[i:j, i:j], v[i:j]) for i, j in pairwise(ends)])


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_couples_the_parameter_blocks(name: str) -> None:
    coupled(ESTIMATORS[name], RELATIVE[name])


def test_an_inverse_of_diagonal_blocks_is_seen() -> None:
    with pytest.raises(AssertionError, match="off by"):
        coupled(planted(solve=blocks_only), 1e-2)


# Products made as v − (v − lr·Hv), which lose lr·H when it is small


def small_in_single(make: Make, relative: float, rate: float | None = None) -> None:
    """A cost times 1e-6 in float32: with the rate that suits it, or (where only H matters) with any."""
    double = quadratic(zeros(4), {"x": zeros(3)}, seed=4)
    scale, top = 1e-6, 1e-6 * double.top
    estimator = make(top, 4)
    unrolled = estimator.claims.target == "unrolled"
    at = (double.params if unrolled else double.solution()).float()
    a, b = scale * double.a.float(), scale * double.b["x"].float()
    v = vector_like(at, seed=5)

    def loss(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return 0.5 * y @ (a @ y) - y @ (b @ inputs["x"])

    inner = solved(loss, at, {"x": double.inputs["x"].float()}, estimator, torchopt.sgd(rate or 1 / top), STEPS * unrolled)
    given = estimator.vjp(inner, v, estimator.init(at))[0]["x"]
    reference = target(double, estimator, v.double(), scale)
    assert given.dtype == torch.float32
    assert_agrees(given.double(), reference, relative=relative)


def cancelling(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    del tree
    matrix = torch.stack([e - (e - a @ e) for e in torch.eye(len(v)).to(v)], dim=1)
    return torch.linalg.lstsq(matrix, v).solution


def single(name: str) -> float:
    """ε = 1.2e-7 times the condition and a few dozen operations; a central difference keeps half the digits."""
    return 5e-3 if RELATIVE[name] >= 1e-6 else 2e-5


# A damping of 1e-9 and a penalty of σ = 0.01, which moves y by σ/H, are set in units of the curvature.
UNSCALED = {"nystrom", "damped", "penalty"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNSCALED])
def test_products_do_not_cancel_in_float32(name: str) -> None:
    small_in_single(ESTIMATORS[name], single(name))


@pytest.mark.parametrize("name", [n for n in IMPLICIT if n not in UNSCALED and not n.startswith("fixed point")])
def test_products_do_not_cancel_in_float32_whatever_the_optimizers_rate(name: str) -> None:
    small_in_single(ESTIMATORS[name], single(name), rate=1.0)


def test_products_that_cancel_are_seen() -> None:
    small_in_single(planted(), 2e-5)
    with pytest.raises(AssertionError, match="off by"):
        small_in_single(planted(solve=cancelling), 5e-3)


# A NaN that is filled with zero, or at which a loop does not start


def nan_stays(make: Make, where: str) -> None:
    problem = quadratic(zeros(4), {"x": zeros(3)}, seed=1)
    v = vector_like(problem.params, seed=2)
    hole = torch.tensor([0.0, float("nan"), 0.0, 0.0]).double()
    estimator = make(problem.top, 4)

    def loss(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return problem.loss(y, inputs) + (hole @ (y * y) if where == "curvature" else 0.0)

    steps = STEPS if estimator.claims.target == "unrolled" else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        try:
            inner = solved(loss, problem.solution(), problem.inputs, estimator, torchopt.sgd(1.0), steps)
            given = estimator.vjp(inner, v + hole if where == "cotangent" else v, estimator.init(v))[0]["x"]
        except fm.FuncmloError:
            return
    assert not torch.isfinite(given).all()


@pytest.mark.parametrize("where", ["cotangent", "curvature"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_is_never_turned_into_zero(name: str, where: str) -> None:
    # An estimator without a curvature does not see the NaN there, but in the slope that it differentiates by x; B has none.
    if where == "curvature" and ESTIMATORS[name](1.0, 4).claims.target in {"identity", "step"}:
        pytest.skip("makes no product with the curvature")
    nan_stays(ESTIMATORS[name], where)


def not_started(a: Tensor, v: Tensor, tree: Any) -> Tensor:
    return late(a, v, tree) if v @ v > 0 else torch.zeros_like(v)


@pytest.mark.parametrize("faults", [{"clean": True}, {"solve": not_started}])
def test_a_nan_that_becomes_zero_is_seen(faults: dict[str, Any]) -> None:
    nan_stays(planted(), "cotangent")
    with pytest.raises(AssertionError):
        nan_stays(planted(**faults), "cotangent")


@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_program_says_that_a_slope_is_nan(name: str) -> None:
    """The upper cost is finite and its slope is 0·∞."""
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=ESTIMATORS[name](1.0, 2)),
        fm.Level("x", lambda x, y: y.sum() + (0 * y).sqrt().sum() + (x**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.ones(2).double(), "x": torch.ones(2).double()})
    with pytest.raises(fm.NonFiniteError):
        program.hypergradient(state, {}, of="x")


# A cross term taken where the inner loop starts


def cross_at_the_solution(make: Make, relative: float) -> None:
    """Take g = Σ ½xy² − y: y* = 1/x, H = x, ∇²_xy g = y, 1/x at the solution and not at the start."""
    x = torch.tensor([0.6, 0.8, 1.0]).double()
    v = torch.tensor([1.0, -2.0, 0.5]).double()
    estimator = make(1.0, 3)

    def loss(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return (inputs["x"] * y**2 / 2 - y).sum()

    inner = solved(loss, torch.full((3,), 0.2).double(), {"x": x}, estimator, torchopt.sgd(1.0), STEPS)
    given = estimator.vjp(inner, v, estimator.init(v))[0]["x"]
    inverse = 1.0 if estimator.claims.target in {"identity", "step"} else 1 / x
    assert_agrees(given, -inverse * v / x, relative=relative)


@pytest.mark.parametrize("name", NAMES)
def test_the_cross_term_is_taken_at_the_solution(name: str) -> None:
    # A penalty of σ = 0.01 has an error of its order squared where g is no quadratic.
    cross_at_the_solution(ESTIMATORS[name], 1e-3 if name == "penalty" else max(RELATIVE[name], 1e-10))


def test_a_cross_term_at_the_start_is_seen() -> None:
    cross_at_the_solution(planted(), 1e-10)
    with pytest.raises(AssertionError, match="off by"):
        cross_at_the_solution(planted(at_start=True), 1e-1)


# A default finite-difference step that is too long for a network with kinks


@functools.cache
def convnet() -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Two convolutions with ReLUs, a weight for each of 16 random images, briefly trained."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    images, labels = normal(2, 16, 1, 8, 8), torch.randint(0, 4, (2, 16), generator=draw)
    y = {"one": normal(6, 1, 3, 3) / 3, "two": normal(8, 6, 3, 3) / 7, "head": normal(32, 4) / 6}

    def logits(y: dict[str, Tensor], at: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(F.conv2d(at, y["one"], padding=1)), 2)
        return F.relu(F.conv2d(hidden, y["two"])).flatten(1) @ y["head"]

    def loss(y: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        weights, at = torch.sigmoid(inputs["x"]), images[0].to(inputs["x"])
        return (weights * F.cross_entropy(logits(y, at), labels[0], reduction="none")).mean()

    x = {"x": torch.zeros(16).double()}
    for _ in range(60):
        slopes = torch.func.grad(loss)(y, x)
        y = {name: p - 0.5 * slopes[name] for name, p in y.items()}
    v = torch.func.grad(lambda y: F.cross_entropy(logits(y, images[1]), labels[1]))(y)
    return loss, y, x, v


def suits_a_convnet(make: Make, dtype: torch.dtype, relative: float) -> None:
    loss, y, x, v = convnet()
    product = torch.func.grad(lambda x: _tree.dot(torch.func.grad(loss)(y, x), v))(x)["x"]
    cast = functools.partial(_tree.map, lambda t: t.to(dtype))
    estimator = make(1.0, _tree.size(y))
    inner = solved(loss, cast(y), cast(x), estimator, torchopt.sgd(1.0))
    given = estimator.vjp(inner, cast(v), estimator.init(cast(y)))[0]["x"]
    assert_agrees(given.double(), -product, relative=relative)


# ε = √ε_m (1 + ‖y‖) leaves O(ε²) of a smooth loss and, where a kink is crossed, O(ε); rounding is √ε_m.
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-5), (torch.float32, 1e-2)])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_default_difference_step_suits_a_convnet(name: str, dtype: torch.dtype, relative: float) -> None:
    suits_a_convnet(ESTIMATORS[name], dtype, relative)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_a_difference_step_that_is_too_long_is_seen(scale: float) -> None:
    with pytest.raises(AssertionError, match="off by"):
        suits_a_convnet(lambda top, size: fm.FiniteDifference(scale=scale), torch.float64, 1e-5)
