"""Projections: Euclidean, with the right derivatives, and what implicit differentiation makes of an active constraint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import funcmlo as fm
from funcmlo import projections, transforms
from funcmlo.projections import ball, box, nonnegative, simplex, soft_threshold
from tests.oracles import assert_agrees, finite_difference
from tests.registry import quadratic, vector_like

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own jvp

N = 6
EPS = torch.finfo(torch.float64).eps
TOP = torch.linspace(0.5, 1.5, N).double()

# A projection on a set, and a map from any vector to a member of it that shares no code with the projection.
Map = Callable[[Tensor], Tensor]
SETS: dict[str, tuple[Map, Map]] = {
    "box": (lambda y: box(y, -0.5, TOP), lambda u: -0.5 + (TOP + 0.5) * torch.sigmoid(u)),
    "one side": (lambda y: box(y, upper=0.25), lambda u: 0.25 - u.abs()),
    "nonnegative": (nonnegative, torch.abs),
    "simplex": (simplex, lambda u: torch.softmax(u, 0)),
    "large simplex": (lambda y: simplex(y, 2.5), lambda u: 2.5 * torch.softmax(u, 0)),
    "1-ball": (lambda y: ball(y, 0.8, 1), lambda u: 0.8 * torch.sign(u) * torch.softmax(u.abs(), 0)),
    "2-ball": (lambda y: ball(y, 0.8), lambda u: 0.8 * u / (1 + u.norm())),
    "∞-ball": (lambda y: ball(y, 0.8, math.inf), lambda u: 0.8 * torch.tanh(u)),
}
# Quarters meet each other and the bounds; other floats hardly ever do.
_entries = st.one_of(st.integers(-12, 12).map(lambda i: i / 4), st.floats(-3, 3))
vectors = st.lists(_entries, min_size=N, max_size=N).map(lambda v: torch.tensor(v, dtype=torch.float64))
scales = st.sampled_from([1e-3, 1.0, 1e3])


@pytest.mark.parametrize("name", SETS)
@given(x=vectors, u=vectors, scale=scales)
def test_they_are_the_euclidean_projections(name: str, x: Tensor, u: Tensor, scale: float) -> None:
    project, member = SETS[name]
    x, z = scale * x, member(u)
    p = project(x)
    # A dozen roundings of numbers of this size.
    size = 1 + float(x.norm())
    rounding = 16 * EPS * size
    assert (x - p) @ (z - p) <= rounding * (size + float(z.norm()))
    assert torch.allclose(project(z), z, rtol=0, atol=16 * EPS * (1 + float(z.norm())))
    assert torch.allclose(project(p), p, rtol=0, atol=rounding)
    assert (p - project(u)).norm() <= (x - u).norm() + rounding


@given(x=vectors, z=vectors, strength=st.sampled_from([0.0, 0.25, 1.3]))
def test_soft_thresholding_is_the_proximal_step(x: Tensor, z: Tensor, strength: float) -> None:
    # p = argmin ½‖p − x‖² + s‖p‖₁ exactly if x − p is a subgradient of s‖·‖₁ at p.
    p = soft_threshold(x, strength)
    assert (x - p) @ (z - p) <= strength * (z.abs().sum() - p.abs().sum()) + 1e-13


@pytest.mark.parametrize("name", [*SETS, "soft threshold"])
@given(x=vectors)
def test_derivatives_are_finite_at_ties_and_bounds_too(name: str, x: Tensor) -> None:
    project = SETS[name][0] if name in SETS else partial(soft_threshold, strength=0.25)
    u = torch.linspace(-1, 2, N).double()
    reverse = jacrev(project)(x)
    assert torch.isfinite(reverse).all()
    assert torch.isfinite(grad(lambda y: (grad(lambda z: project(z) @ u)(y) ** 2).sum())(x)).all()
    assert torch.allclose(jvp(project, (x,), (u,))[1], reverse @ u, rtol=0, atol=1e-14)
    # Every element of a projection's generalized Jacobian is symmetric, with eigenvalues in [0, 1].
    assert torch.allclose(reverse, reverse.T, rtol=0, atol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(reverse)
    assert -1e-14 <= float(eigenvalues.min()) <= float(eigenvalues.max()) <= 1 + 1e-14


def on_support(p: Tensor, n: Tensor) -> Tensor:
    """I − nnᵀ/nᵀn on the support of p, zero elsewhere."""
    s = (p != 0).double()
    n = n * s
    return torch.diag(s) - torch.outer(n, n) / (n @ n)


X = torch.tensor([1.1, -0.9, 0.3, 0.7, -0.2, 0.35]).double()  # inside no set, at no kink
JACOBIANS: dict[str, Callable[[Tensor], Tensor]] = {
    "box": lambda p: torch.diag((p == X).double()),
    "one side": lambda p: torch.diag((X < 0.25).double()),
    "nonnegative": lambda p: torch.diag((X > 0).double()),
    "simplex": lambda p: on_support(p, torch.ones(N).double()),
    "large simplex": lambda p: on_support(p, torch.ones(N).double()),
    "1-ball": lambda p: on_support(p, p.sign()),
    "2-ball": lambda p: 0.8 / X.norm() * (torch.eye(N).double() - torch.outer(X, X) / (X @ X)),
    "∞-ball": lambda p: torch.diag((X.abs() < 0.8).double()),
}


@pytest.mark.parametrize("name", SETS)
def test_jacobians_in_every_mode(name: str) -> None:
    project = SETS[name][0]
    expected = JACOBIANS[name](project(X))
    assert 0 < float(expected.diagonal().sum()) < N  # held in some directions, free in others
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(project)(X), expected, rtol=0, atol=1e-15)
    assert torch.allclose(vmap(jacrev(project))(torch.stack([X, X])), expected.expand(2, N, N), rtol=0, atol=1e-15)
    mapped = vmap(project)(torch.stack([X, 3 * X, -X]))
    assert torch.equal(mapped, torch.stack([project(X), project(3 * X), project(-X)]))
    weights = vector_like(X, 3)
    reference, error = finite_difference(lambda y: weights @ project(y), X, step=1e-3)
    assert_agrees(expected.T @ weights, reference, error, relative=1e-10)
    twice = jacrev(jacrev(project))(X)
    assert torch.allclose(twice, jacfwd(jacrev(project))(X), rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(project, (X.clone().requires_grad_(),))
    assert (float(twice.abs().max()) > 1e-3) == (name == "2-ball")  # the others are piecewise linear


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_a_learned_radius(order: float) -> None:
    r = torch.tensor(0.8).double()
    p = ball(X, r, order)
    expected = {
        1: p.sign() / (p != 0).sum(),
        2: X / X.norm(),
        math.inf: torch.where(X.abs() > 0.8, X.sign(), 0.0),
    }[order]
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(lambda r: ball(X, r, order))(r), expected, rtol=0, atol=1e-15)
        assert torch.equal(jacobian(lambda r: ball(X, r, order))(r + 100), torch.zeros(N).double())


def test_a_learned_sum_learned_bounds_and_a_learned_strength() -> None:
    one = torch.tensor(1.0).double()
    p = simplex(X, one)
    assert torch.allclose(jacfwd(lambda t: simplex(X, t))(one), (p > 0) / (p > 0).sum().double())
    low, high = jacrev(lambda low, high: box(X, low, high), argnums=(0, 1))(-0.5 * one, 0.5 * one)
    assert torch.equal(low, (X < -0.5).double())
    assert torch.equal(high, (X > 0.5).double())
    at_bounds = jacrev(lambda y: box(y, one, one + 1))(torch.tensor([1.0, 1.5, 2.0]).double())
    assert torch.equal(at_bounds, torch.eye(3).double())  # what meets a bound without a force is free
    by_strength = jacrev(lambda s: soft_threshold(X, s))(0.32 * one)
    assert torch.equal(by_strength, torch.where(X.abs() > 0.32, -X.sign(), 0.0))


@pytest.mark.parametrize("name", [*SETS, "soft threshold"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    project = SETS[name][0] if name in SETS else partial(soft_threshold, strength=0.25)
    x = X.to(dtype)
    p = project(x)
    assert p.dtype == dtype
    exact = project(x.double())
    # Bounds are rounded to the dtype, and so is the answer: entries are at most 2.5.
    assert torch.allclose(p.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert grad(lambda y: project(y).sum())(x).dtype == dtype


def test_trees_of_mixed_dtypes() -> None:
    tree = {"a": X.half(), "b": [X.float().reshape(2, 3), X[0]]}
    flat = torch.cat([X.half().double(), X.float().double(), X[:1]])
    for project in (partial(ball, radius=0.7), partial(ball, radius=0.7, order=1), partial(simplex, over="tree")):
        p = project(tree)
        assert (p["a"].dtype, p["b"][0].dtype, p["b"][1].dtype) == (torch.float16, torch.float32, torch.float64)
        together = torch.cat([p["a"].double(), p["b"][0].double().reshape(-1), p["b"][1].reshape(1)])
        assert torch.allclose(together, project(flat), rtol=0, atol=torch.finfo(torch.float16).eps)
        total = grad(lambda t: sum(leaf.double().sum() for leaf in (t["a"], *t["b"])))(p)
        assert total["a"].dtype == torch.float16
    bounds = {"a": 0.5, "b": [torch.tensor([0.1, 0.2, 0.3]), torch.tensor(9.0).double()]}
    p = box(tree, None, bounds)
    assert float(p["a"].max()) == 0.5
    assert torch.equal(p["b"][0], torch.minimum(tree["b"][0], bounds["b"][0]))
    assert torch.equal(p["b"][1], X[0])
    assert ball({}, 1.0) == simplex({}) == box({}, 0.0) == {}
    radii = {"a": 0.1, "b": [torch.tensor([[0.2], [0.3]]), 0.4]}
    with pytest.raises(fm.ParameterError, match="no such dimensions"):  # a number has none
        ball(tree, radii, over=-1)
    rows = ball({**tree, "b": tree["b"][0]}, {**radii, "b": radii["b"][0]}, over=-1)
    assert torch.allclose(rows["b"].norm(dim=-1), torch.tensor([0.2, 0.3]))
    assert abs(float(rows["a"].float().norm()) - 0.1) < 1e-3


def test_what_one_constraint_is_over() -> None:
    y = vector_like(torch.zeros(2, 3, 4).double(), 1)
    for project in (partial(ball, radius=0.3), partial(ball, radius=0.3, order=1), partial(simplex, total=2.0)):
        for dim in range(3):
            loop = torch.stack([torch.stack([project(r, over="leaf") for r in m]) for m in y.movedim(dim, -1)])
            assert torch.equal(project(y, over=dim), loop.movedim(-1, dim))
            assert torch.equal(project(y, over=dim - 3), loop.movedim(-1, dim))
        loop = torch.stack([project(y[:, i], over="leaf") for i in range(3)], 1)
        assert torch.equal(project(y, over=(0, 2)), loop)
        assert torch.equal(project(y, over=(0, 1, 2)), project(y, over="leaf"))
        assert torch.equal(project(y[0, 0, 0], over="leaf"), project(y[0, 0, :1], over="leaf")[0])
    total = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    assert torch.allclose(simplex(y, total[None], over=1).sum(1), total.expand(2, 4))
    assert torch.allclose(simplex(y, total[None], over=(0, 1)).sum((0, 1)), total[0])


def test_extreme_values() -> None:
    for scale in (1e300, 1e-300):
        assert torch.allclose(ball(scale * X, 0.5 * scale) / scale, ball(X, 0.5), rtol=1e-15)
        assert torch.allclose(jacrev(partial(ball, radius=0.5 * scale))(scale * X), jacrev(partial(ball, radius=0.5))(X))
    shifted = simplex((X + 2.0**20).float())
    assert torch.allclose(shifted, simplex((X + 2.0**20).float().double()).float(), rtol=1e-6)
    many = vector_like(torch.zeros(100_000), 1)
    assert abs(float(simplex(many, 50_000.0).double().sum()) / 50_000 - 1) < 1e-6
    masked = torch.tensor([0.3, -math.inf, 0.1])
    assert torch.allclose(simplex(masked), torch.tensor([0.6, 0.0, 0.4]))
    assert torch.isfinite(jacrev(simplex)(masked)).all()
    zero = torch.zeros(3)
    for order in (1, 2, math.inf):
        assert torch.equal(ball(torch.tensor([1.0, -2.0, 0.0]), 0.0, order), zero)
        assert torch.equal(jacrev(partial(ball, radius=0.5, order=order))(zero), torch.eye(3))
        assert torch.isfinite(jacrev(partial(ball, radius=0.0, order=order))(zero)).all()
        assert torch.equal(ball(X, math.inf, order), X)
    assert torch.equal(box(X.half(), -1e9, 1e9), X.half())
    nan = torch.tensor(math.nan)  # what is not finite is not hidden
    for project, size in ((box, 1.0), (lambda y, s: box(y, None, s), 1.0), (simplex, 1.0), (soft_threshold, 1.0)):
        assert torch.isnan(project(torch.stack([nan, nan + 1, zero[0]]), size)).any()
        assert torch.isnan(project(torch.tensor([3.0, 0.5]), nan)).any()
    for order in (1, 2, math.inf):
        assert torch.isnan(ball(torch.stack([nan, zero[0]]), 1.0, order)).any()
        assert torch.isnan(ball(torch.tensor([3.0, 0.5]), nan, order)).any()


P = fm.ParameterError
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "bounds the wrong way": (lambda: box(X, 1, 0), r"box\(lower=1, upper=0\).*expected lower ≤ upper"),
    "a bound of another shape": (lambda: box(X, torch.zeros(5)), r"box\(lower=….*shape \(5,\).*expected.*\(6,\)"),
    "a bound that is larger": (lambda: box(X, None, torch.zeros(2, 6)), r"box\(upper=….*shape \(2, 6\)"),
    "bounds of another tree": (lambda: box({"a": X}, {"b": 0.0}), r"a tree \{'b': \*\} came; expected.*\{'a': \*\}"),
    "integers": (lambda: nonnegative(torch.arange(3)), r"nonnegative projects.*torch.int64"),
    "a number for a tree": (lambda: simplex(1.0), r"simplex projects.*float"),
    "no sum": (lambda: simplex(X, 0.0), r"simplex\(total=0.0\): expected a positive number"),
    "sums of a tree": (lambda: simplex(X, torch.ones(2), over="tree"), r"expected one number, or a 0-d tensor"),
    "sums of another shape": (lambda: simplex(torch.ones(2, 3), torch.ones(2)), r"total=….*\(2,\).*expected.*\(2, 1\)"),
    "no such dimension": (lambda: simplex(X, over=1), r"simplex\(over=1\).*shape \(6,\) has no such dimensions"),
    "a dimension twice": (lambda: simplex(torch.ones(2, 3), over=(1, -1)), r"each once"),
    "no dimensions": (lambda: simplex(X, over=()), r"no such dimensions"),
    "another word": (lambda: ball(X, over="row"), r"ball\(over='row'\).*'leaf' or 'tree'"),
    "nothing to project": (lambda: simplex(torch.zeros(0)), r"no entries to project"),
    "a negative radius": (lambda: ball(X, -1.0), r"ball\(radius=-1.0\)"),
    "a radius that is no number": (lambda: ball(X, math.nan), r"ball\(radius=nan\)"),
    "another norm": (lambda: ball(X, 1.0, 3), r"ball\(order=3\): expected 1, 2 or math.inf"),
    "a negative strength": (lambda: soft_threshold(X, -1.0), r"soft_threshold\(strength=-1.0\)"),
    "no strength": (lambda: soft_threshold(X, None), r"soft_threshold\(strength=None\)"),
    "nothing positive": (lambda: transforms.positive_inverse(torch.tensor([1.0, 0.0])), r"expected values > 0"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_uses_are_answered_by_name(what: str) -> None:
    use, message = WRONG[what]
    with pytest.raises(P, match=message):
        use()


def test_the_interface_is_what_is_documented() -> None:
    for name in projections.__all__:
        assert getattr(projections, name).__doc__
        assert name in (projections.__doc__ or "") or callable(getattr(projections, name))


# Softplus as a parametrization.
RAW = [-700.0, -40.0, -3.0, -1e-3, 0.0, 0.5, 20.5, 36.0, 800.0]


def test_softplus_and_its_inverse_against_sixty_digits() -> None:
    with localcontext() as context:
        context.prec = 400  # 1 + e^−700 keeps its digits
        values = [(1 + Decimal(r).exp()).ln() for r in RAW]
        answers = transforms.positive(torch.tensor(RAW, dtype=torch.float64))
        for answer, value in zip(answers, values, strict=True):
            assert abs(Decimal(float(answer)) / value - 1) < 4 * Decimal(EPS)
        for v in (1e-300, 1e-9, 0.1, math.log(2), 1.0, 19.0, 40.0, 1e5):
            exact = (Decimal(v).exp() - 1).ln()
            answer = Decimal(float(transforms.positive_inverse(torch.tensor(v, dtype=torch.float64))))
            # The terms of the sum are of size v and log v; near v = log 2 they cancel.
            assert abs(answer - exact) < 4 * Decimal(EPS) * max(abs(exact), Decimal(v))


def test_softplus_in_every_mode_dtype_and_tree() -> None:
    raw = torch.tensor(RAW, dtype=torch.float64)
    s = torch.sigmoid(raw)
    for derivative in (vmap(grad(transforms.positive)), lambda r: jacfwd(transforms.positive)(r).diagonal()):
        assert torch.allclose(derivative(raw), s, rtol=1e-15, atol=0)
    for twice in (vmap(grad(grad(transforms.positive))), vmap(jacfwd(grad(transforms.positive)))):
        assert torch.allclose(twice(raw), s * torch.sigmoid(-raw), rtol=1e-14, atol=0)
    tree = {"a": torch.tensor([0.5, 3.0]).half(), "b": torch.tensor(1e-30)}
    there = transforms.positive(transforms.positive_inverse(tree))
    for name, value in tree.items():
        assert there[name].dtype == value.dtype
        assert torch.allclose(there[name], value, rtol=100 * torch.finfo(value.dtype).eps)  # of raw = −69, eᵃ(1 + δ)
    slope = vmap(grad(transforms.positive_inverse))(torch.tensor([1e-9, 1.0, 50.0]).double())
    assert torch.allclose(1 / slope, -torch.expm1(-torch.tensor([1e-9, 1.0, 50.0]).double()), rtol=1e-15)


# Levels with an active constraint.
G = quadratic(torch.zeros(N).double(), {"x": torch.zeros(4).double()}, seed=7)
A, B, POINT, UPPER = G.a, G.b["x"], G.inputs["x"], vector_like(G.params, 8)
RATE, STEPS = 0.9, 130  # eigenvalues of A are in [1/3, 1]: 0.7^130 < 1e-20


def qp(y: Tensor, x: Tensor) -> Tensor:
    return y @ A @ y / 2 - y @ B @ x


def closed(kind: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """Jᵀv by x and by the set's size, from the KKT system on the free entries F: (A_FF + μI) dy + n dλ = (Bdx)_F, nᵀdy = dr.

    The ball's normal is n = y/‖y‖, with the curvature μ = ‖∇g‖/‖y‖ of its boundary; the simplex's is 1, the 1-ball's sign y.
    """
    slope = A @ y - B @ POINT
    if kind == "box":
        free, normals = (y > 0) & (y < SIZES[kind]), torch.zeros(N, 0).double()
    else:
        free = y != 0
        normals = {"simplex": torch.ones(N).double(), "1-ball": y.sign(), "2-ball": y / y.norm()}[kind][:, None]
    mu = float(slope.norm() / y.norm()) if kind == "2-ball" else 0.0
    n, k = normals[free], int(free.sum())
    system = torch.zeros(k + n.shape[1], k + n.shape[1]).double()
    system[:k, :k] = A[free][:, free] + mu * torch.eye(k).double()
    system[:k, k:], system[k:, :k] = n, n.T
    rhs = torch.cat([UPPER[free], torch.zeros(n.shape[1]).double()])
    solved = torch.linalg.solve(system, rhs)
    w = torch.zeros(N).double()
    w[free] = solved[:k]
    if kind == "box":
        top = (y == SIZES[kind]).double()
        return B.T @ w, UPPER @ top - w @ A @ top
    return B.T @ w, solved[k]


SIZES = {"box": 2.0, "simplex": 4.0, "1-ball": 4.0, "2-ball": 1.5}
PROJECTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "box": lambda y, size: box(y, 0.0, size),
    "simplex": lambda y, size: simplex(y, size),
    "1-ball": lambda y, size: ball(y, size, 1),
    "2-ball": lambda y, size: ball(y, size),
}


def solve(kind: str, response: fm.BestResponse, x: Tensor, size: Tensor | float | None = None, **fields) -> Tensor:
    """UPPER · y* with the set's size as an input."""
    size = torch.tensor(SIZES[kind]).double() if size is None else size
    solution = fm.argmin(qp, torchopt.sgd(RATE), steps=STEPS, response=response, project=PROJECTS[kind], **fields)
    return solution(torch.zeros(N).double(), x, size)


def held(kind: str) -> Callable[[Tensor], Tensor]:
    return lambda y: PROJECTS[kind](y, SIZES[kind])


def program(response: fm.BestResponse, project: Callable | None, optimizer: object = None, steps: int = STEPS) -> Tensor:
    levels = fm.Multilevel(
        fm.Level("y", qp, optimizer or torchopt.sgd(RATE), steps=steps, response=response, project=project),
        fm.Level("x", lambda x, y: UPPER @ y, torchopt.sgd(0.1)),
    )
    return levels.hypergradient(levels.init({"y": torch.zeros(N).double(), "x": POINT}), {}, of="x")


GMRES = fm.AID(fm.GMRES(40, tol=1e-14), curvature="fixed_point")
SEEING: dict[str, tuple[fm.BestResponse, float]] = {
    "fixed point, gmres": (GMRES, 1e-11),
    "fixed point, direct": (fm.AID(fm.Direct(), curvature="fixed_point"), 1e-11),
    "fixed point, neumann": (fm.AID(fm.Neumann(130, scale=1.0), curvature="fixed_point"), 1e-11),
    "itd": (fm.ITD(), 1e-11),
    "itd, mixed": (fm.ITD(memory="mixed"), 1e-11),
    "itd, forward": (fm.ITD(mode="forward"), 1e-11),
    # Central differences over σ/‖v‖: σ² of curvature, where the boundary has one, and rounding ε/σ.
    "penalty": (fm.Penalty(1e-5), 1e-9),
    "perturbed": (fm.PerturbedSolve(samples=4), math.inf),  # a few random directions: finite, and no warning
}
BLIND = {
    "hessian": fm.AID(fm.Direct()),
    "cg": fm.AID(fm.CG(20, tol=1e-14)),
    "damped": fm.AID(fm.CG(20), curvature=fm.Damped(0.1)),
    "identity": fm.AID(fm.Identity()),
    "optimizer": fm.AID(fm.OptimizerIdentity()),
    "difference": fm.FiniteDifference(),
    "sama": fm.SAMA(),
}


@pytest.mark.parametrize("kind", SIZES)
def test_the_closed_form_is_the_derivative_of_the_solution(kind: str) -> None:
    size = torch.tensor(SIZES[kind]).double()
    y = solve(kind, fm.ITD(), POINT, size)
    active = {"box": (y == 0) | (y == size), "simplex": y == 0, "1-ball": y == 0, "2-ball": torch.ones(1)}[kind]
    assert active.any()
    if kind == "box":
        assert (y == size).any()
        assert ((y > 0) & (y < size)).sum() >= 2
    elif kind != "2-ball":
        assert 2 <= int((y != 0).sum()) < N
    assert_agrees(held(kind)(y - RATE * (A @ y - B @ POINT)), y, relative=1e-14)

    def moved(at: tuple[Tensor, Tensor]) -> Tensor:
        return UPPER @ solve(kind, fm.ITD(), *at)

    reference, error = finite_difference(moved, (POINT, size), step=1e-3)
    expected = closed(kind, y)
    assert_agrees(expected, reference, error, relative=1e-8)
    # A learned set: through the fixed point, and through the steps.
    for response in (GMRES, fm.ITD()):
        by_x, by_size = grad(lambda x, s, r=response: UPPER @ solve(kind, r, x, s), argnums=(0, 1))(POINT, size)
        assert_agrees((by_x, by_size), torch.cat([expected[0], expected[1].reshape(1)]), relative=1e-11)


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("kind", SIZES)
def test_who_sees_the_projection_is_right(kind: str, name: str) -> None:
    response, relative = SEEING[name]
    answer = program(response, held(kind))
    assert torch.isfinite(answer).all()
    y = solve(kind, fm.ITD(), POINT)
    if relative < math.inf:
        assert_agrees(answer, closed(kind, y)[0], relative=relative)


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("kind", SIZES)
def test_who_does_not_see_it_warns_and_answers_for_the_free_problem(kind: str, name: str) -> None:
    with pytest.warns(
        fm.FuncmloWarning, match=r"level 'y': .* does not see project=.*AID\(GMRES\(…\), curvature='fixed_point'\)"
    ):
        answer = program(BLIND[name], held(kind))
    right = closed(kind, solve(kind, fm.ITD(), POINT))[0]
    assert (answer - right).norm() > 0.1 * right.norm()
    if name in ("hessian", "cg"):
        assert_agrees(answer, B.T @ torch.linalg.solve(A, UPPER), relative=1e-12)


@pytest.mark.parametrize("name", [*SEEING, "hessian", "cg"])
def test_where_no_constraint_is_active_all_agree(name: str) -> None:
    response, relative = SEEING.get(name, (BLIND.get(name), 1e-12))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "level 'y': .* does not see project=", fm.FuncmloWarning)
        for project in (lambda y: box(y, -99.0, 99.0), lambda y: ball(y, 99.0), lambda y: ball(y, 99.0, 1)):
            answer = program(response, project)
            if relative < math.inf:
                assert_agrees(answer, B.T @ torch.linalg.solve(A, UPPER), relative=relative)


def test_the_response_is_zero_along_what_is_held() -> None:
    # y* = min(max(x, 0), 1): each entry's own response is 1 inside of the box and 0 at its sides.
    x = torch.tensor([-1.0, 0.5, 2.0]).double()
    for response in (GMRES, fm.ITD(), fm.OneStep(), fm.Penalty(1e-3)):
        levels = fm.Multilevel(
            fm.Level(
                "y",
                lambda y, x: ((y - x) ** 2).sum() / 2,
                torchopt.sgd(1.0),
                steps=3,
                response=response,
                project=lambda y: box(y, 0.0, 1.0),
            ),
            fm.Level("x", lambda x, y: (y * torch.tensor([1.0, 2.0, 3.0])).sum(), torchopt.sgd(0.1)),
        )
        answer = levels.hypergradient(levels.init({"y": torch.zeros(3).double(), "x": x}), {}, of="x")
        assert torch.allclose(answer, torch.tensor([0.0, 2.0, 0.0]).double(), rtol=0, atol=1e-12)
        if response is GMRES:  # a solution that is held everywhere does not respond
            levels_x = torch.tensor([-1.0, -2.0, 2.0]).double()
            at = levels.init({"y": torch.zeros(3).double(), "x": levels_x})
            assert torch.equal(levels.hypergradient(at, {}, of="x"), torch.zeros(3).double())


@pytest.mark.parametrize("kind", SIZES)
def test_one_step_sees_the_projection_with_its_own_bias(kind: str) -> None:
    y = solve(kind, fm.ITD(), POINT)
    jacobian = jacrev(held(kind))(y - RATE * (A @ y - B @ POINT))
    assert_agrees(program(fm.OneStep(), held(kind)), RATE * B.T @ jacobian @ UPPER, relative=1e-12)


@pytest.mark.parametrize("response", [GMRES, fm.ITD(), fm.OneStep(), fm.Penalty(1e-3)], ids=["aid", "itd", "one", "penalty"])
def test_at_a_kink_the_answer_is_between_the_sides(response: fm.BestResponse) -> None:
    # y* = max(x, 0) at x = 0: the bound is met without a force, and the one-sided derivatives are 0 and 1.
    def lower(y, x):
        return ((y - x) ** 2).sum() / 2

    levels = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(1.0), steps=3, response=response, project=nonnegative),
        fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
    )
    answer = levels.hypergradient(levels.init({"y": torch.zeros(1).double(), "x": torch.zeros(1).double()}), {}, of="x")
    assert 0 <= float(answer) <= 1
    if not isinstance(response, fm.Penalty):  # whose central difference takes the mean of the sides
        assert float(answer) == 1


def test_kinks_of_simplex_and_ball_give_finite_answers() -> None:
    for project, x in (
        (simplex, [1.0, 0.0, 0.0]),  # a vertex, with the others on the edge of the support
        (simplex, [0.5, 0.5, 0.0]),
        (lambda y: ball(y, 1.0), [0.6, 0.8, 0.0]),  # on the sphere, without a force
        (lambda y: ball(y, 1.0, 1), [0.5, -0.5, 0.0]),
    ):
        solution = fm.argmin(
            lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=60, response=GMRES, project=project
        )
        at = torch.tensor(x).double()
        jacobian = jacrev(partial(solution, torch.zeros(3).double()))(at)
        assert torch.isfinite(jacobian).all()
        eigenvalues = torch.linalg.eigvals(jacobian).real
        assert -1e-9 <= float(eigenvalues.min()) <= float(eigenvalues.max()) <= 1 + 1e-9


def test_mapped_over_points_some_held_and_some_free() -> None:
    x = torch.stack([POINT, 0.01 * POINT, -POINT])
    for kind in ("simplex", "2-ball"):
        one = grad(lambda x, kind=kind: UPPER @ solve(kind, GMRES, x))
        assert torch.allclose(vmap(one)(x), torch.stack([one(p) for p in x]), rtol=1e-10, atol=1e-12)


def test_a_learned_radius_in_a_program() -> None:
    # Weights within a ball whose radius is learned on held-out data: y* = r x/‖x‖, so the cost's minimum is known.
    x, target = torch.tensor([3.0, 4.0]).double(), torch.tensor([3.0, 4.0]).double() * 0.4
    levels = fm.Multilevel(
        fm.Level(
            "w",
            lambda w: ((w - x) ** 2).sum() / 2,
            torchopt.sgd(0.5),
            steps=40,
            response=GMRES,
            project=lambda w, log_r: ball(w, log_r.exp()),
        ),
        fm.Level("log_r", lambda log_r, w: ((w - target) ** 2).sum() / 2, torchopt.sgd(0.3)),
    )
    state = levels.init({"w": torch.zeros(2).double(), "log_r": torch.tensor(0.0).double()})
    # d/d log r of (r − 2)²/2 at r = 1.
    assert abs(float(levels.hypergradient(state, {}, of="log_r")) + 1) < 1e-12
    for _ in range(60):
        state, _ = levels.step(state, {})
    assert abs(float(state.params["log_r"].exp()) - 2) < 1e-6


def test_a_projected_min_max_answers_danskin() -> None:
    # max over the simplex of p · losses(x) = C: at p*, dC/dx is the partial derivative, whatever p* does.
    centres = torch.tensor([[0.0, 1.0], [1.0, 0.5], [-1.0, 0.2]]).double()

    def payoff(p, x):
        return (p * ((x - centres) ** 2).sum(-1)).sum() - 2 * (p**2).sum()

    def levels(response: fm.BestResponse) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("p", payoff, torchopt.sgd(0.2), steps=60, response=response, project=simplex, maximize=True),
            fm.Level("x", lambda x, p: payoff(p, x), torchopt.sgd(0.1)),
        )

    start = {"p": torch.full((3,), 1 / 3).double(), "x": torch.tensor([0.7, -2.0]).double()}
    p = levels(fm.ITD()).step(levels(fm.ITD()).init(start), {})[0].params["p"]
    assert 0 < int((p > 0).sum()) < 3
    danskin = grad(lambda x: payoff(p, x))(start["x"])
    for response, relative in ((GMRES, 1e-10), (fm.ITD(), 1e-10), (fm.Penalty(1e-5), 1e-8)):
        made = levels(response)
        assert_agrees(made.hypergradient(made.init(start), {}, of="x"), danskin, relative=relative)
    with pytest.warns(fm.FuncmloWarning, match="does not see project="):
        made = levels(fm.AID(fm.CG(10)))
    wrong = made.hypergradient(made.init(start), {}, of="x")
    assert (wrong - danskin).norm() > 0.1 * danskin.norm()
    state = made.init(start)
    made = levels(GMRES)
    for _ in range(100):
        state, _ = made.step(state, {})
    # At the saddle the losses' pull on x vanishes.
    assert float(grad(lambda x: payoff(state.params["p"], x))(state.params["x"]).norm()) < 1e-3


def test_mixture_weights_of_domains_on_the_simplex() -> None:
    # Three domains y = Xβ_d; the held-out data lie on the other side of the third, whose weight goes to zero.
    torch.manual_seed(0)
    data = torch.randn(3, 40, 3).double()
    truth = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-3.0, -3.0, 2.0]]).double()
    targets = torch.einsum("dij,dj->di", data, truth)
    held_out = torch.randn(40, 3).double()
    held_targets = held_out @ torch.tensor([0.75, 0.5, -0.25]).double()

    def fit(w, domains):
        return domains @ ((data @ w - targets) ** 2).mean(-1) / 2

    def valid(domains, w):
        return ((held_out @ w - held_targets) ** 2).mean() / 2

    levels = fm.Multilevel(
        fm.Level("w", fit, torchopt.sgd(0.5), steps=60, response=fm.AID(fm.CG(5))),
        fm.Level("domains", valid, torchopt.sgd(0.3), project=simplex),  # a top level: nobody asks for its response
    )
    state = levels.init({"w": torch.zeros(3).double(), "domains": torch.full((3,), 1 / 3).double()})
    for _ in range(60):
        state, _ = levels.step(state, {})
        domains = state.params["domains"]
        assert float(domains.min()) >= 0
        assert abs(float(domains.sum()) - 1) < 4 * EPS
    assert float(domains[2]) == 0
    slope = levels.hypergradient(state, {}, of="domains")
    assert_agrees(simplex(domains - 0.3 * slope), domains, relative=1e-3)  # it stands still: the constrained optimum
    assert float(slope[2]) > float(slope[:2].max())


def test_who_is_warned() -> None:
    def levels(response: object, project: object = nonnegative, optimizer: object = None, upper: object = None) -> None:
        fm.Multilevel(
            fm.Level("y", qp, optimizer or torchopt.sgd(0.1), steps=2, response=response, project=project),
            fm.Level("x", lambda x, y: UPPER @ y, torchopt.sgd(0.1), project=upper),
        )

    levels(fm.AID(fm.CG(5)), project=None, upper=nonnegative)  # on top nobody asks for a response
    for response in (
        fm.ITD(window=1),
        fm.ForwardGradient(2),
        fm.PerturbedSolve(2),
        fm.Penalty(steps=3),
        GMRES,
        fm.OneStep(),
    ):
        levels(response)
    with pytest.warns(fm.FuncmloWarning, match=r"FiniteDifference\(\) does not see project="):
        levels({"x": fm.FiniteDifference()})
    solver = fm.Solver(lambda y, x: torch.linalg.solve(A, B @ x))
    for response in (fm.AID(fm.CG(5)), fm.Penalty(steps=3, optimizer=torchopt.sgd(0.1))):
        with pytest.warns(fm.FuncmloWarning, match=r"does not see project=.*in place of its solver"):
            levels(response, optimizer=solver)
    with pytest.warns(fm.FuncmloWarning) as told:  # one sentence is enough where it reads a level, too
        fm.Multilevel(
            fm.Level("y", qp, torchopt.sgd(0.1), response=fm.AID(fm.CG(5)), project=lambda y, r: ball(y, r)),
            fm.Level("r", lambda r, y: UPPER @ y, torchopt.sgd(0.1)),
            fm.Level("x", lambda x, y: UPPER @ y, torchopt.sgd(0.1)),
        )
    assert len([w for w in told if "level 'y'" in str(w.message)]) == 1


def test_where_momentum_and_adam_end() -> None:
    y = solve("box", fm.ITD(), POINT)
    expected = closed("box", y)[0]
    adam = torchopt.adam(0.1, betas=(0.5, 0.9), eps=0.5)
    for optimizer, steps in ((torchopt.sgd(0.5, momentum=0.5), 150), (adam, 700)):
        assert_agrees(program(GMRES, held("box"), optimizer, steps), expected, relative=1e-8)
    # A ball couples the entries along the steps' metric: Adam ends elsewhere, momentum does not.
    momentum = program(GMRES, held("2-ball"), torchopt.sgd(0.5, momentum=0.5), 150)
    assert_agrees(momentum, closed("2-ball", solve("2-ball", fm.ITD(), POINT))[0], relative=1e-8)

    def ends(optimizer: object) -> Tensor:
        solution = fm.argmin(qp, optimizer, steps=700, response=fm.ITD(), project=held("2-ball"))
        return solution(torch.zeros(N).double(), POINT)

    assert (ends(adam) - ends(torchopt.sgd(RATE))).norm() > 1e-2
