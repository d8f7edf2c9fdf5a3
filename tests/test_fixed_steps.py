"""The solvers that make a fixed number of steps, or none: gradient steps, the Neumann series, the identities."""

from __future__ import annotations

import warnings

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo import _tree, optim
from funcmlo.operators import Operator
from tests.registry import OPTIMIZERS, vector_like
from tests.test_linear import matrix, operator

FOUR = torch.zeros(4).double()


def diagonal(*eigenvalues: float) -> Operator:
    h = torch.tensor(eigenvalues).double()
    return Operator(lambda u: h * u, like=torch.zeros_like(h))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_steps_are_the_optimizers(name: str) -> None:
    h, v = matrix(4, 0, condition=3.0), vector_like(FOUR, 1)
    w = torch.zeros_like(v).requires_grad_()
    optimizer = optim.mend(OPTIMIZERS[name]())
    state = optimizer.init(w.detach())
    for _ in range(6):
        (gradient,) = torch.autograd.grad(0.5 * w @ h @ w - v @ w, w)
        updates, state = optimizer.update(gradient, state, params=w.detach())
        w = optim.apply(w.detach(), updates).requires_grad_()
    solver = fm.GradientSteps(OPTIMIZERS[name](), 6)
    solution = solver.solve(operator(h, v), v)
    assert torch.allclose(solution.value, w, rtol=1e-12)
    assert solution.products == 5  # at zero the gradient is −v
    # The state goes on: two and four steps are six.
    first = fm.GradientSteps(OPTIMIZERS[name](), 2).solve(operator(h, v), v)
    second = fm.GradientSteps(OPTIMIZERS[name](), 4).solve(operator(h, v), v, start=first.carry)
    assert torch.allclose(second.value, w, rtol=1e-12)
    assert second.products == 4
    assert _tree.mismatch(solver.start(v), second.carry) is None


def test_one_step_of_gradient_descent_is_soba() -> None:
    v, u = torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, -1.0]).double()
    solver = fm.GradientSteps(torchopt.sgd(0.1), 1)
    solution = solver.solve(diagonal(2.0, 4.0), v, start=(u, solver.start(v)[1]))
    assert torch.allclose(solution.value, u - 0.1 * (torch.tensor([6.0, -4.0]).double() - v), rtol=1e-15)
    assert torch.allclose(solution.residual, torch.tensor([5.0, -6.0]).double().norm() / v.norm(), rtol=1e-15)
    assert solution.products == 1


@pytest.mark.parametrize("k", [2, 5, 9])
def test_the_residual_of_gradient_steps_is_one_step_late(k: int) -> None:
    # One mode with 1 − ρλ = 1/2: after K steps 2^−K, seen at the gradient before.
    solution = fm.GradientSteps(torchopt.sgd(0.5), k).solve(diagonal(1.0), torch.ones(1).double())
    assert float(solution.residual) == 2.0 ** -(k - 1)
    assert float(1.0 - solution.value) == 2.0**-k


@pytest.mark.parametrize("make", [lambda k: fm.GradientSteps(torchopt.sgd(0.8), k), lambda k: fm.Neumann(k, 0.8)])
def test_the_error_falls_geometrically(make: object) -> None:
    h, v = matrix(4, 0, condition=2.0), vector_like(FOUR, 1)
    errors = [float((make(k).solve(operator(h, v), v).value - torch.linalg.solve(h, v)).norm()) for k in (10, 20, 40)]
    # Rates |1 − 0.8 λ| of λ in [1/2, 1] are at most 0.6.
    assert errors[1] <= 1.01 * 0.6**10 * errors[0]
    assert errors[2] <= 1.01 * 0.6**20 * errors[1]


@pytest.mark.parametrize("eigenvalues", [(5.0, 1.0), (-3.0, 1.0)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_steps_that_diverge_stay_finite(eigenvalues: tuple[float, ...], size: float, momentum: float) -> None:
    v = size * torch.ones(2)
    solver = fm.GradientSteps(torchopt.sgd(1.0, momentum=momentum), 400)
    h = torch.tensor(eigenvalues)
    solution = solver.solve(Operator(lambda u: h * u, like=v), v)
    assert torch.isfinite(solution.value).all()
    assert not bool(solution.converged)
    assert 1 / torch.finfo(torch.float32).eps < float(solution.residual) < 1e10
    assert bool(solution.negative_curvature) == (min(eigenvalues) < 0)
    assert solution.products < 100
    # The next solve starts anew.
    w, state = solution.carry
    assert _tree.mismatch(solver.start(v), (w, state)) is None
    assert torch.equal(w, torch.zeros(2))
    # Under a map the steps go on, and the answer is the same.
    many = solver.init(Operator(lambda u: h * u, like=v)).solve_block(v[None])
    assert torch.allclose(many.value[0], solution.value, rtol=1e-6)


def test_a_start_for_a_larger_right_hand_side_has_not_diverged() -> None:
    solver = fm.GradientSteps(torchopt.sgd(1.0), 60)
    before = solver.solve(diagonal(0.5, 1.0), 1e20 * torch.ones(2).double())
    after = solver.solve(diagonal(0.5, 1.0), torch.ones(2).double(), start=before.carry)
    # The start has 10²⁰ times the length of w: 2⁻⁶⁰ of it is left in the slow mode.
    assert float(after.residual) < 1e21 * 2.0**-59
    assert float(after.iterations) == 60


def test_a_zero_right_hand_side_is_solved_from_anywhere() -> None:
    solver = fm.GradientSteps(torchopt.sgd(0.1), 3)
    before = solver.solve(diagonal(0.5, 1.0), torch.ones(2).double())
    solution = solver.solve(diagonal(0.5, 1.0), torch.zeros(2).double(), start=before.carry)
    assert torch.equal(solution.value, torch.zeros(2).double())
    assert bool(solution.converged)


def test_rounding_is_no_negative_curvature() -> None:
    q = torch.linalg.eigh(matrix(4, 0))[1]
    h = (q @ torch.diag(torch.tensor([0.0, 0.0, 0.5, 1.0], dtype=q.dtype)) @ q.T).float()
    solver, state = fm.GradientSteps(torchopt.sgd(0.1), 1), fm.GradientSteps(torchopt.sgd(0.1), 1).start(torch.zeros(4))[1]
    for angle in range(40):  # in the null space, where ⟨w, Hw⟩ is rounding of either sign
        w = (q[:, 0] * torch.cos(torch.tensor(angle)) + q[:, 1] * torch.sin(torch.tensor(angle))).float()
        solution = solver.solve(Operator(lambda u: h @ u, like=w), torch.ones(4), start=(w, state))
        assert not bool(solution.negative_curvature)


def test_an_update_that_overflows_is_not_made() -> None:
    v = torch.full((2,), 1e20)
    solution = fm.GradientSteps(torchopt.sgd(1e25), 3).solve(Operator(lambda u: u, like=v), v)
    assert torch.equal(solution.value, torch.zeros(2))
    assert not bool(solution.converged)


def test_gradient_steps_take_what_is_not_symmetric() -> None:
    h, v = torch.tensor([[1.0, 0.8], [-0.8, 1.0]]).double(), torch.tensor([1.0, 2.0]).double()
    solution = fm.GradientSteps(torchopt.sgd(0.5), 200).solve(Operator(lambda u: h @ u, like=v, symmetric=False), v)
    assert torch.allclose(h @ solution.value, v, rtol=1e-12)


def test_neumann_estimates_its_scale() -> None:
    h, v = 1e3 * matrix(20, 0, condition=30.0), vector_like(torch.zeros(20).double(), 1)
    ready = fm.Neumann(300, power_iterations=6).init(operator(h, v))
    assert ready.products == 6
    assert 1.0 <= 1e3 * float(ready.prepared) < 2.0  # 1/λ_max ≤ α < 2/λ_max
    solution = ready.solve(v)
    assert solution.products == 300
    assert bool(solution.converged)
    assert torch.allclose(h @ solution.value, v, rtol=0, atol=1e-3 * float(v.norm()))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert torch.equal(fm.Neumann(3, power_iterations=6).init(operator(h, v)).prepared, ready.prepared)
    assert not torch.equal(fm.Neumann(3, power_iterations=6, seed=1).init(operator(h, v)).prepared, ready.prepared)
    assert torch.equal(torch.random.get_rng_state(), state)
    better = fm.Neumann(3, power_iterations=60).init(operator(h, v)).prepared
    assert 1.0 <= 1e3 * float(better) <= min(1.01, 1e3 * float(ready.prepared))


def test_neumann_estimates_no_scale_of_what_is_not_symmetric() -> None:
    v = torch.ones(2)
    with pytest.raises(fm.EstimatorError, match=r"Neumann\(scale=None\) estimates .* symmetric H, .* scale=1.0"):
        fm.Neumann(3).solve(Operator(lambda u: u, like=v, symmetric=False), v)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_series_that_must_diverge_is_told(size: float) -> None:
    v = size * torch.ones(2)
    for eigenvalues, message in (
        ((4.0, 1.0), r"scale=1\) diverges: H has an eigenvalue of at least (3\.\d|4); .* below 2/λ_max ≤ 0\.5"),
        ((-3.0, 1.0), r"scale=1\) diverges: H has a negative eigenvalue, at most -(2\.\d|3), .* damping=…\) or MINRES"),
    ):
        h = torch.tensor(eigenvalues)
        with pytest.warns(fm.FuncmloWarning, match=message):
            solution = fm.Neumann(400, 1.0).solve(Operator(lambda u, h=h: h * u, like=v), v)
        assert torch.isfinite(solution.value).all()
        assert not bool(solution.converged)
        assert bool(solution.negative_curvature) == (min(eigenvalues) < 0)
        assert solution.products < 60
        # The residual of a sum that was left is its own.
        true = ((v - h * solution.value) / size).norm() / 2**0.5
        assert torch.allclose(solution.residual, true, rtol=1e-3)
        # Nothing can be said under a transform, where all steps are made.
        ready = fm.Neumann(400, 1.0).init(Operator(lambda u, h=h: h * u, like=v))
        many = ready.solve_block(v[None])
        assert torch.allclose(many.value[0], solution.value, rtol=1e-5)


def test_a_series_that_may_converge_is_not_told() -> None:
    # Quotients of a symmetric H alone prove something: this one turns by almost 90° a step, and contracts.
    turn = 0.9 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    v = torch.tensor([1.0, 1.0]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backwards = Operator(lambda u: 2.5 * u - 0.1 * turn @ u, like=v, symmetric=False)
        assert torch.isfinite(fm.Neumann(5, 1.0).solve(backwards, v).value).all()
        assert not bool(fm.Neumann(5, 1.9).solve(diagonal(1.0, 0.5), v).negative_curvature)
        # Semidefinite: the quotients fall to zero, to rounding, and not below.
        flat = matrix(4, 0)
        eigenvalues, q = torch.linalg.eigh(flat)
        eigenvalues[:2] = 0
        single = (q @ torch.diag(eigenvalues) @ q.T).float()
        u = torch.ones(4)
        assert not bool(fm.Neumann(300, 1.0).solve(Operator(lambda x: single @ x, like=u), u).negative_curvature)


def test_identities() -> None:
    v = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0, dtype=torch.bfloat16)}
    refused = Operator(lambda u: pytest.fail("it was applied"), like=v, adapt=lambda u: _tree.scale(0.1, u))
    solution = fm.Identity(2.0).solve(refused, v)
    assert torch.equal(solution.value["a"], torch.tensor([2.0, 4.0]))
    assert _tree.mismatch(v, solution.value) is None
    adapted = fm.OptimizerIdentity(2.0).solve(refused, v)
    assert torch.allclose(adapted.value["a"], torch.tensor([0.2, 0.4]))
    for found in (solution, adapted):
        assert (found.residual, found.converged, found.negative_curvature) == (None, None, None)
        assert (found.products, found.iterations) == (0, 0)
    for solver in (fm.Identity(2.0), fm.OptimizerIdentity(2.0)):
        block = solver.init(refused).solve_block(_tree.map(lambda x: torch.stack([x, 2 * x]), v))
        assert torch.equal(block.value["a"][1], 2 * solver.solve(refused, v).value["a"])
        assert block.residual is None
    assert not any((s.uses_operator, s.inverts, s.exact)[i] for s in (fm.Identity, fm.OptimizerIdentity) for i in range(3))
    with pytest.raises(fm.EstimatorError, match=r"OptimizerIdentity needs the update .* no adapt= .* use Identity\(scale\)"):
        fm.OptimizerIdentity().solve(Operator(lambda u: u, like=v), v)


def test_the_optimizers_identity_preconditions() -> None:
    # A diagonal H, and an optimizer that has learned 1/h: one step is enough.
    h, v = torch.tensor([1.0, 30.0, 900.0]).double(), torch.ones(3).double()
    op = Operator(lambda u: h * u, like=v, adapt=lambda u: u / h)
    for solver in (fm.CG, fm.MINRES, fm.GMRES):
        solution = solver(3, preconditioner=fm.OptimizerIdentity()).solve(op, v)
        assert torch.allclose(solution.value, 1 / h, rtol=1e-12)
        assert solution.products == 1


WRONG = {
    r"GradientSteps\(optimizer=0.1\): expected a torchopt optimizer": lambda: fm.GradientSteps(0.1, 3),
    r"GradientSteps\(steps=0\): expected an integer of at least 1": lambda: fm.GradientSteps(torchopt.sgd(1.0), 0),
    r"GradientSteps\(tol=-1.0\)": lambda: fm.GradientSteps(torchopt.sgd(1.0), 1, tol=-1.0),
    r"Neumann\(scale=0.0\): expected a positive number below 2/λ_max": lambda: fm.Neumann(1, 0.0),
    r"Neumann\(power_iterations=0\)": lambda: fm.Neumann(1, power_iterations=0),
    r"Neumann\(seed='a'\): expected an integer": lambda: fm.Neumann(1, seed="a"),
    r"^Identity\(scale=0\): expected a finite number above zero": lambda: fm.Identity(0),
    r"OptimizerIdentity\(scale=True\): expected a finite number above zero": lambda: fm.OptimizerIdentity(True),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_out_of_range(message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        WRONG[message]()
