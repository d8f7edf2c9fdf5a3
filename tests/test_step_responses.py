"""The curvature of the level's own step: what the optimizer, its decay and its projection know."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from tests.oracles import assert_agrees, finite_difference
from tests.registry import quadratic, solved, vector_like

Q = quadratic(torch.zeros(3).double(), {"x": torch.zeros(2).double()}, seed=1)
A, B = Q.a, Q.b["x"]
X, V = Q.inputs["x"], vector_like(Q.params, 2)
EYE = torch.eye(3).double()


def loss(y: Tensor, x: Tensor) -> Tensor:
    """½ yᵀAy − yᵀBx, with eigenvalues of A in [1/3, 1]."""
    return y @ A @ y / 2 - y @ B @ x


def by_name(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return loss(y, inputs["x"])


def laid_out(curvature: object, at: fm.Solved) -> Tensor:
    return curvature.within(at, _tree.zeros_like(at.params), lambda operator, rhs, cross: operator.dense())


# The optimizer, and R with Jᵀv = Bᵀ R v where its steps end. Coupled decay μ adds μI to the Hessian. AdamW ends where
# g/(|g| + ε) = −μy, that is g = −εμy/(1 − μ|y|), whose slope by y is εμ/(1 − μ|y|)².
DECAY, EPSILON = 0.4, 0.5
Shift = Callable[[Tensor], Tensor]
STEPS: dict[str, tuple[object, Shift]] = {
    "sgd": (torchopt.sgd(0.9), lambda y: 0.0 * EYE),
    "momentum": (torchopt.sgd(0.5, momentum=0.5), lambda y: 0.0 * EYE),
    "nesterov": (torchopt.sgd(0.5, momentum=0.5, nesterov=True), lambda y: 0.0 * EYE),
    "dampened": (torchopt.sgd(0.5, momentum=0.5, dampening=0.3), lambda y: 0.0 * EYE),
    "adam": (torchopt.adam(0.3, betas=(0.5, 0.9), eps=EPSILON), lambda y: 0.0 * EYE),
    "clipped": (
        torchopt.chain(torchopt.clip.clip_grad_norm(0.3), torchopt.sgd(0.5, momentum=0.5)),
        lambda y: 0.0 * EYE,
    ),
    "coupled decay": (torchopt.sgd(0.5, momentum=0.5, weight_decay=DECAY), lambda y: DECAY * EYE),
    "decoupled decay": (
        torchopt.adamw(0.3, betas=(0.5, 0.9), eps=EPSILON, weight_decay=DECAY),
        lambda y: torch.diag(EPSILON * DECAY / (1 - DECAY * y.abs()) ** 2),
    ),
}

LENGTH = {"adam": 400, "decoupled decay": 600}  # Adam's second moments forget slowly; the others' ρ is about 0.7


def solvers(radius: float) -> dict[str, fm.LinearSolver]:
    """The solvers of systems that are not symmetric; the series is as long as the steps' contraction ρ asks for."""
    return {
        "gmres": fm.GMRES(40, tol=1e-14),
        "neumann": fm.Neumann(math.ceil(math.log(1e-14) / math.log(radius)), scale=1.0),
        "normal": fm.NormalEquations(fm.CG(60, tol=1e-15)),
        "direct": fm.Direct(),
    }


@pytest.mark.parametrize("name", STEPS)
def test_the_step_knows_where_it_ends(name: str) -> None:
    optimizer, shift = STEPS[name]
    steps = LENGTH.get(name, 100)
    at = solved(by_name, Q.params, Q.inputs, fm.OneStep(), optimizer, steps=steps)
    expected = B.T @ torch.linalg.solve(A + shift(at.params), V)
    system = laid_out(fm.FixedPoint(), at)
    radius = float(torch.linalg.eigvals(torch.eye(len(system)) - system).abs().max())
    assert radius**steps < 1e-14  # the steps have ended
    condition = float(torch.linalg.cond(system))
    for solver in solvers(radius).values():
        answers, _, stats = fm.AID(solver, curvature="fixed_point").vjp(at, V, None)
        assert stats.converged
        # Rounding by the condition number; squared, by the normal equations and by a matrix that is not normal.
        assert_agrees(answers["x"], expected, relative=1e-14 * condition**2)
    if "decay" in name:
        plain = fm.AID(fm.Direct()).vjp(at, V, None)[0]["x"]
        assert (plain - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("name", STEPS)
def test_the_step_in_programs_and_solution_maps(name: str) -> None:
    optimizer, shift = STEPS[name]
    steps = LENGTH.get(name, 100)
    at = solved(by_name, Q.params, Q.inputs, fm.OneStep(), optimizer, steps=steps)
    expected = B.T @ torch.linalg.solve(A + shift(at.params), V)
    response = fm.AID(fm.GMRES(40, tol=1e-13), curvature="fixed_point")
    program = fm.Multilevel(
        fm.Level("y", loss, optimizer, steps=steps, response=response),
        fm.Level("x", lambda x, y: V @ y, torchopt.sgd(0.1)),
    )
    state = program.init({"y": Q.params, "x": X})
    assert_agrees(program.hypergradient(state, {}, of="x"), expected, relative=1e-10)
    if name == "decoupled decay":
        return  # a fresh optimizer does not stand still where its own moments would have to be g and g²
    solve = fm.argmin(loss, optimizer, steps=steps, response=response)
    leaf = X.clone().requires_grad_()
    (V @ solve(Q.params, leaf)).backward()
    for answer in (torch.func.grad(lambda x: V @ solve(Q.params, x))(X), leaf.grad):
        assert_agrees(answer, expected, relative=1e-10)
    xs = torch.stack([X, X + 1])
    mapped = torch.vmap(torch.func.grad(lambda x: V @ solve(Q.params, x)))(xs)
    assert_agrees(mapped, torch.stack([expected, expected]).reshape(-1), relative=1e-10)


@pytest.mark.filterwarnings("ignore:composition=")
def test_a_learned_rate_leaves_the_solution_where_it_is() -> None:
    response = fm.AID(fm.GMRES(40, tol=1e-14), curvature="fixed_point")

    def optimizer(rate):
        return torchopt.sgd(rate)

    program = fm.Multilevel(
        fm.Level("y", loss, optimizer, steps=100, response=response),
        fm.Level("rate", lambda rate, x, y: V @ y, torchopt.sgd(0.1)),
        fm.Level("x", lambda x, y: V @ y, torchopt.sgd(0.1)),
    )
    state = program.init({"y": Q.params, "x": X, "rate": torch.tensor(0.9).double()})
    solve = fm.argmin(loss, optimizer, steps=100, response=response)
    by_x, by_rate = torch.func.grad(lambda x, rate: V @ solve(Q.params, x, rate), argnums=(0, 1))(X, state.params["rate"])
    # (∂Φ/∂rate)ᵀ w = −⟨∇g, w⟩, and ∇g is rounding.
    for answer in (program.hypergradient(state, {}, of="rate"), by_rate):
        assert abs(float(answer)) < 1e-13
    for answer in (program.hypergradient(state, {}, of="x"), by_x):
        assert_agrees(answer, Q.response(V)["x"], relative=1e-12)


def box(y, top):
    """The set 0 ≤ y ≤ top of a dual support vector machine, its top an upper level's."""
    return torch.minimum(torch.relu(y), top)


def soft_threshold(y, strength):
    """The proximal step of strength · ‖y‖₁ for gradient descent of rate 0.9."""
    return torch.sign(y) * torch.relu(y.abs() - 0.9 * strength)


G = quadratic(torch.zeros(6).double(), {"x": torch.zeros(4).double()}, seed=7)
POINT, UPPER = G.inputs["x"], vector_like(G.params, 8)


def qp(y: Tensor, x: Tensor) -> Tensor:
    return y @ G.a @ y / 2 - y @ G.b["x"] @ x


def by_active_set(y: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Jᵀv by the input and by the projection's own one: A_FF y_F = (Bx)_F − A_FU top or − strength · sign(y_F)."""
    top = y == (2.0 if kind == "box" else torch.inf)
    free = (y != 0) & ~top
    w = torch.zeros(6).double()
    w[free] = torch.linalg.solve(G.a[free][:, free], UPPER[free])
    by_top = UPPER[top].sum() - w @ G.a @ top.double()
    return G.b["x"].T @ w, by_top if kind == "box" else -(w @ torch.sign(y))


@pytest.mark.filterwarnings("ignore:composition=")
@pytest.mark.parametrize("solver", ["gmres", "neumann", "normal", "direct"])
@pytest.mark.parametrize("kind", ["box", "lasso"])
def test_projections_and_proximal_steps_at_work(kind: str, solver: str) -> None:
    project = {"box": box, "lasso": soft_threshold}[kind]
    own = torch.tensor(2.0 if kind == "box" else 0.8).double()
    # The free part contracts by 1 − 0.9/3 = 0.7 at most: 0.7^120 < 1e-18.
    response = fm.AID(solvers(0.7)[solver], curvature="fixed_point")
    solve = fm.argmin(qp, torchopt.sgd(0.9), steps=120, response=response, project=project)
    y = solve(G.params, POINT, own)
    held = (y == 0) | (y == own) if kind == "box" else y == 0
    assert int(held.sum()) == (4 if kind == "box" else 3)
    assert int((y == own).sum()) == (1 if kind == "box" else 0)
    expected = by_active_set(y, kind)

    def f(x: tuple[Tensor, Tensor]) -> Tensor:
        return UPPER @ solve(G.params, *x)

    again, error = finite_difference(f, (POINT, own), step=1e-4)  # within the piece of the solution map
    assert_agrees(expected, again, error, relative=1e-8)
    inputs = (POINT.clone().requires_grad_(), own.clone().requires_grad_())
    for answer in (torch.func.grad(f)((POINT, own)), torch.autograd.grad(f(inputs), inputs)):
        assert_agrees(answer, torch.cat([expected[0], expected[1][None]]), relative=1e-12)
    name = "top" if kind == "box" else "strength"
    program = fm.Multilevel(
        fm.Level("y", qp, torchopt.sgd(0.9), steps=120, response=response, project=project),
        fm.Level(name, (lambda top, y: UPPER @ y) if kind == "box" else (lambda strength, y: UPPER @ y), torchopt.sgd(0.1)),
        fm.Level("x", lambda x, y: UPPER @ y, torchopt.sgd(0.1)),
    )
    state = program.init({"y": G.params, "x": POINT, name: own})
    for upper, reference in zip(("x", name), expected, strict=True):
        assert_agrees(program.hypergradient(state, {}, of=upper), reference.reshape(-1), relative=1e-12)


@pytest.mark.filterwarnings("ignore:composition=")
def test_a_threshold_with_momentum_is_a_smaller_one() -> None:
    # y = P(y − ηm) and m = g/(1 − μ), so g = −(1 − μ) strength · sign(y) on the support.
    program = fm.Multilevel(
        fm.Level(
            "y",
            qp,
            torchopt.sgd(0.9, momentum=0.3),
            steps=120,  # μ^(120/2) < 1e-31 where the Hessian's modes oscillate
            response=fm.AID(fm.GMRES(40, tol=1e-14), curvature="fixed_point"),
            project=soft_threshold,
        ),
        fm.Level("strength", lambda strength, y, x: UPPER @ y, torchopt.sgd(0.1)),
        fm.Level("x", lambda x, y: UPPER @ y, torchopt.sgd(0.1)),
    )
    state = program.init({"y": G.params, "x": POINT, "strength": torch.tensor(0.8 / 0.7).double()})
    solve = fm.argmin(qp, torchopt.sgd(0.9), steps=120, response=fm.ITD(), project=soft_threshold)
    by_x, by_strength = by_active_set(solve(G.params, POINT, torch.tensor(0.8).double()), "lasso")
    assert_agrees(program.hypergradient(state, {}, of="x"), by_x, relative=1e-12)
    assert_agrees(program.hypergradient(state, {}, of="strength"), 0.7 * by_strength.reshape(1), relative=1e-12)


@pytest.mark.parametrize("project", [None, lambda y: y.clamp(-10, 10)], ids=["plain", "let be"])
@pytest.mark.parametrize("rate", [1e-4, 1e-5, 1e-6])
def test_no_digits_cancel_at_tiny_rates(rate: float, project: Callable[[Tensor], Tensor] | None) -> None:
    # I − (I − ηA) would hold ηA to ε/η only: 6 % of it at η = 1e-6.
    a, b = A.float(), B.float()
    seen = []

    class Spy(fm.LinearSolver):
        def compute(self, operator, prepared, rhs, start):
            seen.append(operator.dense())
            return fm.Direct().solve(operator, rhs)

    response = fm.AID(Spy(), curvature="fixed_point")
    solve = fm.argmin(
        lambda y, x: y @ a @ y / 2 - y @ b @ x, torchopt.sgd(rate), steps=0, response=response, project=project
    )
    y, v = torch.linalg.solve(a, b @ X.float()), V.float()
    leaf = X.float().requires_grad_()
    answer = torch.autograd.grad(v @ solve(y, leaf), leaf)[0]
    assert (seen[0].double() - rate * a.double()).abs().max() <= 1e-5 * rate
    assert_agrees(answer.double(), Q.response(V)["x"], relative=2e-5)


def test_inside_a_nested_composition_the_step_is_of_the_total_cost() -> None:
    # z* = sin y + x, and T(y, x) = ½‖y − x‖² + 0.3 ⟨y, tanh z*⟩, whose minimum moves with x through z too.
    def program(response: fm.BestResponse) -> fm.Multilevel:
        inner = fm.AID(fm.Direct())
        return fm.Multilevel(
            fm.Level("z", lambda z, y, x: ((z - torch.sin(y) - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=inner),
            fm.Level(
                "y",
                lambda y, x, z: ((y - x) ** 2).sum() / 2 + 0.3 * (y * torch.tanh(z)).sum(),
                torchopt.sgd(0.7),
                steps=40,
                response=response,
            ),
            fm.Level("x", lambda x, y: torch.cos(y).sum(), torchopt.sgd(0.1)),
            composition="nested",
        )

    def gradient(response: fm.BestResponse) -> Tensor:
        p = program(response)
        return p.hypergradient(p.init(dict.fromkeys("zyx", torch.tensor([0.3, -0.5]).double())), {}, of="x")

    by_step = gradient(fm.AID(fm.GMRES(10, tol=1e-14), curvature="fixed_point"))
    assert_agrees(by_step, gradient(fm.AID(fm.GMRES(10, tol=1e-14))), relative=1e-12)


def test_an_outside_solver_has_no_step() -> None:
    responses = {
        fm.AID(fm.GMRES(3), curvature="fixed_point"): r"looks at the optimizer's step, and an outside solver has none",
        fm.OneStep(): r"OneStep differentiates the optimizer's step, and an outside solver has none",
        fm.SAMA(): r"the level has no optimizer",
        fm.AID(fm.OptimizerIdentity()): r"the level has no optimizer",
    }
    for response, message in responses.items():
        solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), fm.Solver(lambda y, x: x), steps=1, response=response)
        with pytest.raises(fm.EstimatorError, match=message):
            torch.func.grad(lambda x, solve=solve: solve(torch.zeros(2), x).sum())(torch.ones(2))


@pytest.mark.parametrize("optimizer", [torchopt.sgd(0.5), torchopt.adam(0.1)], ids=["sgd", "adam"])
def test_the_optimizers_scaling_is_none_of_a_steps_space(optimizer: object) -> None:
    at = solved(by_name, Q.solution(), Q.inputs, fm.OneStep(), optimizer)
    for solver in (fm.OptimizerIdentity(), fm.GMRES(5, preconditioner=fm.OptimizerIdentity())):
        with pytest.raises(fm.EstimatorError, match=r"scales a gradient, and curvature='fixed_point' has the optimizer's"):
            fm.AID(solver, curvature="fixed_point").vjp(at, V, None)
