"""`argmin` and `fixed_point` as functions of ordinary torch code: against closed forms, differences and themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

import funcmlo as fm
from funcmlo import _tree
from tests.oracles import assert_agrees, bits, finite_difference
from tests.registry import COMPUTED, ESTIMATORS, RELATIVE, quadratic, structures, vector_like

EXACT = {
    "cg": fm.AID(fm.CG(30, tol=1e-14)),
    "direct": fm.AID(fm.Direct()),
    "neumann": fm.AID(fm.Neumann(60, scale=0.8)),
    "itd": fm.ITD(),
}
SGD = torchopt.sgd(0.88)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return vector_like(torch.zeros(*shape).double(), seed)


B = normal(3, 4, seed=1) / 3


def loss(y: Tensor, x: Tensor) -> Tensor:
    """Strictly convex in y, with a Hessian between 0.98 and 1.02: 10 steps of rate 0.88 leave under 1e-8, 20 under 1e-16."""
    return 0.5 * y @ y - y @ B @ torch.sin(x) + 0.02 * torch.cos(y + x[:3]).sum()


def upper(y: Tensor, x: Tensor) -> Tensor:
    return torch.sin(2 * y).sum() + 0.1 * (x**3).sum()


def objective(response: fm.BestResponse) -> Callable[[Tensor], Tensor]:
    solve = fm.argmin(loss, SGD, steps=20, response=response)
    return lambda x: upper(solve(torch.zeros(3).double(), x), x)


def autograd(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]

    return gradient


@pytest.mark.parametrize("response", EXACT.values(), ids=EXACT)
def test_first_second_and_third_derivatives(response: fm.BestResponse) -> None:
    f, x = objective(response), normal(4, seed=3)
    first, error = finite_difference(f, x, step=1e-2)
    assert_agrees(torch.func.grad(f)(x), first, error)
    assert_agrees(autograd(f)(x), first, error)
    (_, pull) = torch.func.vjp(f, x)
    assert_agrees(pull(torch.ones(()).double())[0], first, error)

    hessian = torch.func.jacrev(torch.func.grad(f))(x)
    by_autograd = torch.autograd.functional.hessian(f, x)
    for i in range(4):
        row, error = finite_difference(lambda at, i=i: torch.func.grad(f)(at)[i], x, step=2e-3)
        assert_agrees(hessian[i], row, error)
        assert_agrees(by_autograd[i], row, error)

    def curvature(at: Tensor) -> Tensor:
        return (torch.func.jacrev(torch.func.grad(f))(at) ** 2).sum()

    third, error = finite_difference(curvature, x, step=1e-2)
    assert_agrees(torch.func.grad(curvature)(x), third, error)


@pytest.mark.parametrize("response", EXACT.values(), ids=EXACT)
def test_maps_in_every_order(response: fm.BestResponse) -> None:
    f, xs = objective(response), normal(2, 3, 4, seed=4)
    one_by_one = torch.stack([torch.stack([torch.func.grad(f)(x) for x in row]) for row in xs])
    mapped = torch.vmap(torch.vmap(torch.func.grad(f)))(xs)
    of_map = torch.func.grad(lambda all: torch.vmap(torch.vmap(f))(all).sum())(xs)
    leaf = xs.clone().requires_grad_()
    torch.vmap(torch.vmap(f))(leaf).sum().backward()
    for answer in (mapped, of_map, leaf.grad):
        assert torch.allclose(answer, one_by_one, rtol=1e-12, atol=1e-13)
    jacobian = torch.func.jacrev(fm.argmin(loss, SGD, steps=20, response=response), argnums=1)
    assert jacobian(torch.zeros(3).double(), xs[0, 0]).shape == (3, 4)


@pytest.mark.parametrize("response", EXACT.values(), ids=EXACT)
def test_maps_over_starts_and_batches(response: fm.BestResponse) -> None:
    def lower(y: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        data, which = batch
        return 0.5 * y @ y - y @ B @ torch.sin(x) - (y * data[which]).sum()

    solve = fm.argmin(lower, SGD, steps=20, response=response)
    starts, data, which, x = normal(5, 3, seed=1), normal(5, 7, seed=2), torch.randint(7, (5, 3)), normal(4, seed=3)

    def f(x: Tensor, start: Tensor, data: Tensor, which: Tensor) -> Tensor:
        return upper(solve(start, x, batch=(data, which)), x)

    gradient = torch.func.grad(f)
    expected = torch.stack([gradient(x, *parts) for parts in zip(starts, data, which, strict=True)])
    mapped = torch.vmap(gradient, in_dims=(None, 0, 0, 0))(x, starts, data, which)
    assert torch.allclose(mapped, expected, rtol=1e-12)
    values = torch.vmap(lambda start: solve(start, x, batch=(data[0], which[0])))(starts)
    assert torch.allclose(values, values[:1].expand(5, 3), rtol=1e-12)  # one solution from wherever


@given(seed=st.integers(0, 2**20), tree=structures(), other=structures())
@pytest.mark.parametrize("name", COMPUTED)
def test_trees_of_every_shape(name: str, seed: int, tree: object, other: object) -> None:
    # With a condition number of one every estimator's target is the implicit formula's.
    q = quadratic(tree, {"x": other}, seed, condition=1.0)
    estimator = ESTIMATORS[name](q.top, q.a.shape[0])
    solve = fm.argmin(lambda y, x: q.loss(y, {"x": x}), torchopt.sgd(1.0), steps=2, response=estimator)
    weights = vector_like(tree, seed + 5)

    def f(x: object) -> Tensor:
        return _tree.dot(weights, solve(q.params, x))

    leaves, structure = _tree.flatten(q.inputs["x"])
    if not leaves:
        return
    answer = torch.func.grad(lambda flat: f(_tree.unflatten(structure, flat)))(leaves)
    expected = q.response(weights)["x"]
    relative = max(RELATIVE[name], 1e-10)
    assert_agrees(
        _tree.unflatten(structure, answer), expected, relative=relative, size=torch.linalg.vector_norm(expected) + 1
    )


def trilevel(inner: fm.BestResponse, outer: fm.BestResponse) -> Callable[[Tensor], Tensor]:
    lowest = fm.argmin(
        lambda z, y, x: 0.5 * z @ z - z @ B[:, :3] @ torch.sin(y) - 0.3 * (z * x).sum() + 0.02 * torch.cos(z).sum(),
        SGD,
        steps=20,
        response=inner,
    )

    def middle(y: Tensor, x: Tensor) -> Tensor:
        z = lowest(torch.zeros(3).double(), y, x)
        return 0.5 * y @ y - 0.3 * (y * x).sum() + 0.2 * (y * torch.tanh(z)).sum() + 0.1 * (z**2).sum()

    solve = fm.argmin(middle, SGD, steps=20, response=outer)
    return lambda x: torch.cos(solve(torch.zeros(3).double(), x)).sum()


@pytest.mark.parametrize(("inner", "outer"), list(itertools.product(["cg", "itd"], repeat=2)))
def test_inside_itself(inner: str, outer: str) -> None:
    f, x = trilevel(EXACT[inner], EXACT[outer]), normal(3, seed=8)
    reference, error = finite_difference(f, x, step=1e-2)
    assert_agrees(torch.func.grad(f)(x), reference, error)
    assert_agrees(autograd(f)(x), reference, error)
    if inner == outer == "cg":
        xs = normal(2, 3, seed=9)
        mapped = torch.vmap(torch.func.grad(f))(xs)
        assert torch.allclose(mapped, torch.stack([torch.func.grad(f)(x) for x in xs]), rtol=1e-10)


def test_inside_a_level() -> None:
    # The lower problem of a level's own loss: T(x) = (argmin_y ½‖y − x‖²)·x = x², whose argmin pulls to 1.
    inner = fm.argmin(lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), steps=1, response=fm.AID(fm.CG(3)))
    program = fm.Multilevel(fm.Level("x", lambda x: ((inner(torch.zeros(2), x) - 1) ** 2).sum() / 2, torchopt.sgd(1.0)))
    state, _ = program.step(program.init({"x": torch.tensor([3.0, -1.0])}), {})
    assert torch.allclose(state.params["x"], torch.ones(2))


CALLS: dict[str, Callable[[Callable, Tensor], object]] = {
    "torch.func.grad": lambda f, x: torch.func.grad(f)(x),
    "autograd": lambda f, x: autograd(f)(x),
    "map of a gradient": lambda f, x: torch.vmap(torch.func.grad(f))(x.expand(2, 3)),
    "gradient of a map": lambda f, x: torch.func.grad(lambda xs: torch.vmap(f)(xs).sum())(x.expand(2, 3)),
}


def closing(kind: str, response: fm.BestResponse) -> Callable[[Tensor], Tensor]:
    """A function whose loss reaches x in a way that no solution map can see."""

    class Holder:
        pass

    def f(x: Tensor) -> Tensor:
        start, holder = torch.zeros(3).double(), Holder()
        holder.x = x

        def plain(y):
            return ((y - x) ** 2).sum()

        def helper(y):
            return ((y - x) ** 2).sum()

        losses = {
            "closure": plain,
            "default": lambda y, x=x: ((y - x) ** 2).sum(),
            "partial": functools.partial(lambda x, y: ((y - x) ** 2).sum(), x),
            "attribute": lambda y: ((y - holder.x) ** 2).sum(),
            "nested function": lambda y: helper(y),
            "list": functools.partial(lambda xs, y: ((y - xs[0]) ** 2).sum(), [x]),
        }
        return fm.argmin(losses[kind], SGD, steps=2, response=response)(start).sum()

    return f


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("response", [fm.AID(fm.CG(3)), fm.ITD()], ids=["aid", "itd"])
@pytest.mark.parametrize("kind", ["closure", "default", "partial", "attribute", "nested function", "list"])
def test_a_loss_that_closes_over_a_traced_tensor_is_refused(kind: str, response: fm.BestResponse, call: Callable) -> None:
    with pytest.raises(fm.EstimatorError, match=r"which is being differentiated|is being differentiated.*no input"):
        call(closing(kind, response), normal(3))


def test_the_refusal_names_the_tensor_and_the_remedy() -> None:
    with pytest.raises(fm.EstimatorError, match=r"closes over 'x', which .*solve\(init, …, x\), where the loss takes it"):
        torch.func.grad(closing("closure", fm.AID(fm.CG(3))))(normal(3))
    module = nn.Linear(3, 1).double()
    solve = fm.argmin(lambda y: module(y).sum() + (y**2).sum(), SGD, steps=2, response=fm.AID(fm.CG(3)))
    with pytest.raises(fm.EstimatorError, match=r"it requires grad.*or, if nothing is to be differentiated by it, detach"):
        solve(torch.zeros(3).double())
    module.requires_grad_(False)
    assert solve(torch.zeros(3).double()).shape == (3,)


def test_what_is_not_differentiated_may_be_closed_over() -> None:
    def f(x: Tensor, c: Tensor) -> Tensor:  # c is mapped, not differentiated
        solve = fm.argmin(lambda y, x: ((y - c * x) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=fm.AID(fm.CG(3)))
        return solve(torch.zeros(2), x).sum()

    answer = torch.vmap(torch.func.grad(f))(torch.ones(2, 2), torch.tensor([1.0, 3.0]))
    assert torch.allclose(answer, torch.tensor([[1.0, 1.0], [3.0, 3.0]]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, inside its jvp
def test_forward_mode() -> None:
    x, tangent = normal(4, seed=1), normal(4, seed=2)
    f = objective(fm.ITD())
    _, directional = torch.func.jvp(f, (x,), (tangent,))
    assert torch.allclose(directional, torch.func.grad(f)(x) @ tangent)
    for call in (
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.jacfwd(f)(x),
        lambda f: torch.func.hessian(f)(x),
    ):
        with pytest.raises(fm.EstimatorError, match=r"no forward-mode derivative .*use reverse mode"):
            call(objective(fm.AID(fm.CG(3))))


def test_an_estimator_that_cannot_be_differentiated_again_says_so() -> None:
    f, x = objective(fm.FiniteDifference()), normal(4)
    assert torch.isfinite(torch.func.grad(f)(x)).all()
    assert torch.isfinite(autograd(f)(x)).all()
    for second in (torch.func.jacrev(torch.func.grad(f)), functools.partial(torch.autograd.functional.hessian, f)):
        with pytest.raises(fm.EstimatorError, match=r"FiniteDifference\(\) cannot be differentiated again"):
            second(x)


def test_a_failed_solve_is_nan_under_a_transform_and_an_error_outside() -> None:
    # At y = 0 this loss has a maximum, so there is no strict minimum whose derivative could be asked for.
    solve = fm.argmin(lambda y, x: (torch.cos(y) * x).sum(), SGD, steps=0, response=fm.AID(fm.CG(5)))
    start, x = torch.zeros(2), torch.ones(2)
    assert torch.func.grad(lambda x: solve(start, x).sum())(x).isnan().all()
    with pytest.raises(fm.EstimatorError, match=r"met a direction of zero or negative curvature.*damping="):
        autograd(lambda x: solve(start, x).sum())(x)


def test_without_steps_the_start_is_the_solution() -> None:
    solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), SGD, steps=0, response=fm.AID(fm.CG(3)))
    x = normal(3)
    assert torch.equal(solve(x, x), x)
    assert torch.allclose(torch.func.grad(lambda at: solve(x, at).sum())(x), torch.ones(3).double())
    for response in (fm.ITD(),):
        with pytest.raises(fm.EstimatorError, match="ITD follows inner steps, but steps=0 makes none"):
            fm.argmin(loss, SGD, steps=0, response=response)


def test_the_start_is_differentiated_by_itd_alone() -> None:
    x = torch.ones(2)
    by_start = {
        name: torch.func.grad(
            lambda start, response=response: fm.argmin(
                lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.25), steps=2, response=response
            )(start, x).sum()
        )(torch.zeros(2))
        for name, response in EXACT.items()
    }
    assert torch.allclose(by_start["itd"], torch.full((2,), 0.75**2))
    assert torch.equal(by_start["cg"], torch.zeros(2))


def test_learned_rates_projections_maximization_and_metrics() -> None:
    solve = fm.argmin(
        lambda y, x: (-((y - x) ** 2).sum() / 2, {"metric": 1.0}),
        lambda rate: torchopt.sgd(rate),
        steps=2,
        response=fm.ITD(),
        project=lambda y: y.clamp(max=1.0),
        maximize=True,
    )
    assert solve.inputs == ("x", "rate")
    x = torch.tensor([1.0, 8.0]).double()
    # y₂ = x (1 − (1 − r)²) where nothing is clamped.
    by_rate = torch.func.grad(lambda rate: solve(torch.zeros(2).double(), x, rate).sum())(torch.tensor(0.25).double())
    assert torch.allclose(by_rate, torch.tensor(2 * 0.75 * 1.0).double())
    assert torch.equal(solve(torch.zeros(2).double(), x, rate=torch.tensor(0.25).double())[1], torch.tensor(1.0).double())


def test_indexed_batches_and_random_losses_repeat() -> None:
    seen = []

    def source(t: int) -> Tensor:
        seen.append(t)
        return torch.tensor(float(t)).double()

    solve = fm.argmin(
        lambda y, x, batch: ((y - x) ** 2).sum() * (1 + torch.rand(())) + 0.01 * batch * y.sum(),
        SGD,
        steps=3,
        response=fm.ITD(),
    )
    x, start = normal(2), torch.zeros(2).double()
    first = solve(start, x, batch=source)
    assert sorted(set(seen)) == [0, 1, 2]
    drawn = torch.random.get_rng_state()
    assert bits(first) == bits(solve(start, x, batch=source))
    assert torch.equal(drawn, torch.random.get_rng_state())


def test_nothing_is_recorded_where_nothing_is_asked_for() -> None:
    x = normal(4)
    for response in EXACT.values():
        solve = fm.argmin(loss, SGD, steps=2, response=response)
        assert not solve(torch.zeros(3).double(), x).requires_grad
        with torch.no_grad():
            assert not solve(torch.zeros(3).double(), x.clone().requires_grad_()).requires_grad
        assert solve(torch.zeros(3).double(), x.clone().requires_grad_()).requires_grad


def test_an_outside_solver_stands_in_for_the_optimizer() -> None:
    minimize = pytest.importorskip("scipy.optimize").minimize
    ridge_regression = pytest.importorskip("sklearn.linear_model").Ridge

    a, c = normal(8, 3, seed=2), normal(8, seed=3)

    def ridge(y: Tensor, decay: Tensor) -> Tensor:
        return ((a @ y - c) ** 2).sum() / 2 + decay.exp() * (y**2).sum() / 2

    def closed(y: Tensor, decay: Tensor) -> Tensor:
        return torch.linalg.solve(a.T @ a + decay.exp() * torch.eye(3).double(), a.T @ c)

    def scipy(y: Tensor, decay: Tensor) -> Tensor:
        def value(flat):
            at = torch.as_tensor(flat).requires_grad_()
            with torch.enable_grad():
                cost = ridge(at, decay)
            return float(cost), torch.autograd.grad(cost, at)[0].numpy()

        return torch.as_tensor(minimize(value, y.numpy(), jac=True, tol=1e-14).x)

    def sklearn(y: Tensor, decay: Tensor) -> Tensor:
        model = ridge_regression(alpha=float(decay.exp()), fit_intercept=False, solver="cholesky")
        return torch.as_tensor(model.fit(a.numpy(), c.numpy()).coef_)

    decay = torch.tensor(0.3).double()
    expected, error = finite_difference(lambda d: torch.sin(closed(None, d)).sum(), decay)
    # scipy stops where the gradient is near √ε, so its solution, and the derivative there, are as far off.
    for function, relative in ((closed, 1e-9), (sklearn, 1e-9), (scipy, 1e-5)):
        solve = fm.argmin(ridge, fm.Solver(function), steps=1, response=fm.AID(fm.CG(5, tol=1e-14)))

        def f(decay: Tensor, solve: Callable = solve) -> Tensor:
            return torch.sin(solve(torch.zeros(3).double(), decay)).sum()

        assert_agrees(torch.func.grad(f)(decay), expected, error, relative=relative, size=1.0)
        assert_agrees(autograd(f)(decay), expected, error, relative=relative, size=1.0)


FIXED = {"neumann": fm.AID(fm.Neumann(80, scale=1.0)), "direct": fm.AID(fm.Direct()), "itd": fm.ITD()}
W = 0.6 * normal(4, 4, seed=5) / torch.linalg.matrix_norm(normal(4, 4, seed=5), 2)


@pytest.mark.parametrize("response", FIXED.values(), ids=FIXED)
def test_fixed_points_of_a_map_that_is_no_gradient(response: fm.BestResponse) -> None:
    solve = fm.fixed_point(lambda y, x, batch: torch.tanh(W @ y + x * batch), steps=80, response=response)

    def f(x: Tensor) -> Tensor:
        return (solve(torch.zeros(4).double(), x, batch=torch.tensor(0.7).double()) ** 2).sum()

    x = normal(4, seed=6)
    reference, error = finite_difference(f, x, step=1e-2)
    assert_agrees(torch.func.grad(f)(x), reference, error)
    assert_agrees(autograd(f)(x), reference, error)
    hessian = torch.func.jacrev(torch.func.grad(f))(x)
    for i in range(4):
        row, error = finite_difference(lambda at, i=i: torch.func.grad(f)(at)[i], x, step=2e-3)
        assert_agrees(hessian[i], row, error)
    xs = normal(3, 4, seed=7)
    assert torch.allclose(torch.vmap(torch.func.grad(f))(xs), torch.stack([torch.func.grad(f)(x) for x in xs]), rtol=1e-12)


def test_third_derivatives_through_a_map_that_is_no_gradient() -> None:
    solve = fm.fixed_point(lambda y, x: torch.tanh(W @ y + x), steps=80, response=fm.AID(fm.Direct()))

    def curvature(x: Tensor) -> Tensor:
        f = torch.func.grad(lambda at: (solve(torch.zeros(4).double(), at) ** 2).sum())
        return (torch.func.jacrev(f)(x) ** 2).sum()

    x = normal(4, seed=6)
    reference, error = finite_difference(curvature, x, step=2e-3)
    assert_agrees(torch.func.grad(curvature)(x), reference, error, relative=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_every_forward_mode_is_right_or_refused() -> None:
    x, tangent = normal(4, seed=1), normal(4, seed=2)
    start = torch.zeros(3).double()

    def by_duals(f: Callable[[Tensor], Tensor]) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent

    def solve(response: fm.BestResponse, steps: int = 20) -> Callable[[Tensor], Tensor]:
        return lambda at: fm.argmin(loss, SGD, steps=steps, response=response)(start, at)

    expected = torch.func.jvp(solve(fm.ITD()), (x,), (tangent,))[1]
    assert torch.allclose(by_duals(solve(fm.ITD())), expected)
    fixed = fm.fixed_point(lambda y, at: torch.sin(at[:3]) - 0.1 * y, steps=0, response=fm.AID(fm.Direct()))

    def closing_over(at: Tensor) -> Tensor:
        return fm.argmin(lambda y: ((y - at[:3]) ** 2).sum(), SGD, steps=2, response=fm.AID(fm.CG(3)))(start)

    for f in (solve(fm.AID(fm.CG(5))), solve(fm.AID(fm.CG(5)), steps=0), lambda at: fixed(start, at)):
        with pytest.raises(fm.EstimatorError, match="no forward-mode derivative"):
            by_duals(f)
    for call in (by_duals, lambda f: torch.func.jvp(f, (x,), (tangent,))):
        with pytest.raises(fm.EstimatorError, match="closes over 'at'"):
            call(closing_over)


def test_inference_mode_is_refused_where_a_gradient_is_needed() -> None:
    x, start = normal(4), torch.zeros(3).double()
    with torch.inference_mode():
        for response in EXACT.values():
            with pytest.raises(fm.EstimatorError, match=r"argmin takes gradients, which torch.inference_mode forbids"):
                fm.argmin(loss, SGD, steps=2, response=response)(start, x)
        root = fm.fixed_point(lambda y, x: (y + x / y) / 2, steps=8, response=fm.AID(fm.Direct()))
        assert torch.allclose(root(torch.ones(()), torch.tensor(9.0)), torch.tensor(3.0))


def test_what_is_handed_in_is_not_written_to() -> None:
    x = torch.ones(2)
    cases = {
        "its init was": lambda: fm.fixed_point(lambda y, x: y.mul_(0.5).add_(x), steps=3, response=fm.AID(fm.Direct()))(
            torch.zeros(2), x
        ),
        "its input 'x' was": lambda: fm.argmin(lambda y, x: (x.mul_(2) * y).sum(), SGD, steps=1, response=fm.AID(fm.CG(3)))(
            torch.zeros(2), x.clone()
        ),
    }
    for message, call in cases.items():
        with pytest.raises(fm.LossError, match=message + r" changed in place"):
            call()

    def writing(y: Tensor, x: Tensor) -> Tensor:  # a solver has copies, so it may write, and unseen through numpy too
        x.numpy()[:] = 7.0
        return y.copy_(x)

    start = torch.zeros(2)
    solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), fm.Solver(writing), steps=1, response=fm.AID(fm.CG(3)))
    assert torch.equal(solve(start, x), torch.full((2,), 7.0))
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(start, torch.zeros(2))


def test_the_start_may_be_written_to_before_the_backward_pass() -> None:
    start, x = torch.zeros(3).double(), normal(4).requires_grad_()
    y = fm.argmin(loss, SGD, steps=20, response=fm.AID(fm.CG(5)))(start, x)
    start.copy_(y.detach())  # a warm start for the next call
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@pytest.mark.filterwarnings("ignore:argmin. AID.CG.3.. does not see project=")
def test_an_outside_solver_is_projected_reads_what_the_loss_declares_and_nests() -> None:
    x = torch.ones(2)

    def square(y, x):
        return ((y - x) ** 2).sum()

    solve = fm.argmin(
        square, fm.Solver(lambda y, x: 10 * x), steps=1, response=fm.AID(fm.CG(3)), project=lambda y: y.clamp(-1, 1)
    )
    assert torch.equal(solve(torch.zeros(2), x), torch.ones(2))

    level = fm.Level(
        "p", lambda p, q: ((p - q) ** 2).sum(), fm.Solver(lambda p, q: q), reads={"q": "y"}, response=fm.AID(fm.CG(3))
    )
    assert level.reads_levels == ("y",)

    by_numpy = fm.argmin(
        square, fm.Solver(lambda y, x: torch.from_numpy(x.numpy().copy())), steps=1, response=fm.AID(fm.CG(3))
    )
    outer = fm.argmin(
        lambda z, x: ((z - by_numpy(torch.zeros(2), x)) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=fm.AID(fm.CG(3))
    )
    assert torch.allclose(torch.func.grad(lambda x: outer(torch.zeros(2), x).sum())(x), torch.ones(2))
    with pytest.raises(fm.EstimatorError, match=r"its solver failed under a torch.func transform .* call it in a loop"):
        torch.vmap(lambda x: by_numpy(torch.zeros(2), x))(torch.ones(3, 2))


def test_a_solve_that_diverged_or_stopped_early_is_told() -> None:
    stiff = torch.tensor([1.0, 100.0]).double()

    def f(response: fm.BestResponse) -> Callable[[Tensor], Tensor]:
        solve = fm.argmin(lambda y, x: (stiff * (y - x) ** 2).sum() / 2, SGD, steps=0, response=response)
        return lambda x: solve(torch.zeros(2).double(), x).sum()

    x = torch.ones(2).double()
    diverging = f(fm.AID(fm.Neumann(30, scale=0.1)))
    told = r"Neumann\(…, scale=0.1\) diverges: H has an eigenvalue of at least 1e\+02"
    with pytest.warns(fm.FuncmloWarning, match=told):
        assert torch.func.grad(diverging)(x).isnan().all()
    refused = r"AID\(Neumann\(30, scale=0.1\)\) diverged \(residual"
    with pytest.warns(fm.FuncmloWarning, match=told), pytest.raises(fm.EstimatorError, match=refused):
        autograd(diverging)(x)
    with pytest.warns(fm.FuncmloWarning, match=r"AID\(CG\(1\)\) stopped at a relative residual of .* raise its iterations"):
        autograd(f(fm.AID(fm.CG(1))))(x)


def test_more_that_is_refused_or_warned_of() -> None:
    class Holder:
        pass

    def holding(x: Tensor) -> Holder:
        holder = Holder()
        holder.x = x
        return holder

    start = torch.zeros(2)

    def by_projection(x):
        held = holding(x)
        project = lambda y: torch.minimum(y, held.x)  # ruff: ignore[lambda-assignment]
        return fm.argmin(lambda y: (y**2).sum(), SGD, steps=1, response=fm.ITD(), project=project)(start).sum()

    def by_optimizer(x):
        held = holding(x)
        return fm.argmin(lambda y: (y**2).sum(), lambda: torchopt.sgd(held.x.sum()), steps=1, response=fm.ITD())(
            start + 1
        ).sum()

    def by_solver(x):
        return fm.argmin(lambda y: (y**2).sum(), fm.Solver(lambda y: y * x), steps=1, response=fm.AID(fm.CG(3)))(start).sum()

    def by_batch(x):
        solve = fm.argmin(lambda y, batch: ((y - batch) ** 2).sum(), SGD, steps=2, response=fm.ITD())
        return solve(start, batch=lambda t: x if t else start).sum()

    for f in (by_projection, by_optimizer, by_solver, by_batch):
        for call in (torch.func.grad(f), autograd(f)):
            with pytest.raises((fm.EstimatorError, fm.BatchError), match="being differentiated"):
                call(torch.ones(2))
    with pytest.warns(fm.FuncmloWarning, match=r"argmin: AID looks at the solution alone, .* \(rate\) is zero; use ITD"):
        fm.argmin(lambda y, x: (y - x) ** 2, lambda rate: torchopt.sgd(rate), steps=1, response=fm.AID(fm.CG(3)))


weight = torch.ones(2, requires_grad=True)


def test_an_attribute_is_not_the_global_of_its_name() -> None:
    bag = nn.Linear(2, 1).requires_grad_(False)

    def later(y):
        return helper(y) + (bag.weight * y).sum()

    solve = fm.argmin(later, SGD, steps=1, response=fm.AID(fm.CG(3)))

    def helper(y):
        return (y**2).sum()

    assert solve(torch.zeros(2)).shape == (2,)
    with pytest.raises(fm.EstimatorError, match="closes over 'weight'"):
        fm.argmin(lambda y: (weight * y).sum(), SGD, steps=1, response=fm.AID(fm.CG(3)))(torch.zeros(2))


def test_batched_gradients_of_an_older_kind_are_refused() -> None:
    f, x = objective(fm.AID(fm.CG(5, tol=1e-14))), normal(4, seed=3)
    with pytest.raises(fm.EstimatorError, match=r"vectorize=True.*use torch.func.jacrev"):
        torch.autograd.functional.jacobian(f, x, vectorize=True)


def test_a_failed_solve_is_nan_in_every_derivative() -> None:
    solve = fm.argmin(
        lambda y, x: -(y**2).sum() / 2 - (x * y).sum(), fm.Solver(lambda y, x: -x), steps=1, response=fm.AID(fm.CG(5))
    )

    def f(x: Tensor) -> Tensor:
        return (solve(torch.zeros(2), x) ** 2).sum()

    x = torch.ones(2)
    assert torch.func.grad(f)(x).isnan().all()
    assert torch.func.jacrev(torch.func.grad(f))(x).isnan().all()


def test_an_optimizer_with_a_traced_rate_is_refused() -> None:
    def f(rate: Tensor) -> Tensor:
        return fm.argmin(lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(rate, momentum=0.9), steps=1, response=fm.ITD())(
            torch.zeros(2), torch.ones(2)
        ).sum()

    for call in (torch.func.grad(f), autograd(f)):
        with pytest.raises(fm.EstimatorError, match="which is being differentiated"):
            call(torch.tensor(0.25))


def test_a_batch_is_not_written_to() -> None:
    solve = fm.argmin(lambda y, batch: ((y - batch.mul_(2)) ** 2).sum(), SGD, steps=1, response=fm.AID(fm.CG(3)))
    with pytest.raises(fm.LossError, match="argmin: its batch was changed in place"):
        solve(torch.zeros(2), batch=torch.ones(2))
    p = fm.Multilevel(fm.Level("y", lambda y, batch: ((y - batch.mul_(2)) ** 2).sum(), SGD))
    with pytest.raises(fm.LossError, match="the batch of level 'y' was changed in place"):
        p.step(p.init({"y": torch.zeros(2)}), {"y": torch.ones(2)})


def test_tensors_from_inference_mode_and_names_of_every_kind() -> None:
    with torch.inference_mode():
        x = torch.ones(2) * 3
    solve = fm.argmin(
        lambda y, init, self: ((y - init * self) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=fm.AID(fm.CG(3))
    )
    assert torch.equal(solve(x * 0, init=x, self=torch.ones(2)), x + 0)
    gradient = torch.func.grad(lambda at: solve(x, at, x).sum())(torch.ones(2))
    assert torch.allclose(gradient, torch.full((2,), 3.0))
    with (
        torch.inference_mode(),
        pytest.raises(fm.EstimatorError, match=r"init makes parameters .* torch.inference_mode forbids"),
    ):
        fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), SGD)).init({"y": torch.zeros(2)})


def test_nothing_is_refused_where_nothing_is_differentiated() -> None:
    weight = torch.ones(2, requires_grad=True)
    solve = fm.argmin(lambda y: ((y - weight) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=fm.ITD())
    with torch.no_grad():
        assert torch.equal(solve(torch.zeros(2)), torch.ones(2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_over_a_map_is_refused() -> None:
    solve = fm.argmin(loss, SGD, steps=2, response=fm.AID(fm.CG(3)))
    mapped = torch.vmap(lambda x: solve(torch.zeros(3).double(), x))
    with pytest.raises(fm.EstimatorError, match="no forward-mode derivative"):
        torch.func.jvp(mapped, (normal(2, 4),), (normal(2, 4),))
