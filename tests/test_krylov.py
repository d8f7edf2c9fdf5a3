"""MINRES, GMRES and the normal equations: their iterates are the best of the Krylov space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo.operators import Operator
from tests.registry import vector_like
from tests.test_linear import matrix, operator

EIGHT = torch.zeros(8).double()


def skewed(n: int, seed: int) -> torch.Tensor:
    """A well-conditioned matrix that is not symmetric: its symmetric part has eigenvalues in [1, 2]."""
    noise = vector_like(torch.zeros(n, n).double(), seed)
    return torch.diag(torch.linspace(1, 2, n).double()) + (noise - noise.T) / 2


def plain(h: torch.Tensor, v: torch.Tensor, symmetric: bool = False) -> Operator:
    return Operator(lambda u: h @ u, like=v, symmetric=symmetric, transpose=lambda u: h.T @ u)


def best(h: torch.Tensor, v: torch.Tensor, k: int) -> torch.Tensor:
    """The w of least ‖v − Hw‖ in span{v, …, H^(k−1) v}."""
    powers = [v / v.norm()]
    for _ in range(k - 1):
        powers.append(h @ powers[-1] / (h @ powers[-1]).norm())
    krylov = torch.linalg.qr(torch.stack(powers, dim=1))[0]
    return krylov @ torch.linalg.lstsq(h @ krylov, v[:, None]).solution[:, 0]


@given(seed=st.integers(0, 2**20), k=st.integers(1, 6), negative=st.integers(0, 8))
@pytest.mark.parametrize("solver", [fm.MINRES, fm.GMRES])
def test_the_iterates_have_the_least_residual(solver: Callable, seed: int, k: int, negative: int) -> None:
    h, v = matrix(8, seed, condition=10.0, negative=negative), vector_like(EIGHT, seed + 1)
    solution = solver(k, tol=0.0).solve(operator(h, v), v)
    expected = best(h, v, k)
    # The power basis of `best` has a condition number of up to 10⁶.
    assert torch.allclose(solution.value, expected, rtol=0, atol=1e-8 * float(torch.linalg.inv(h).norm() * v.norm()))
    assert torch.allclose(solution.residual, (v - h @ solution.value).norm() / v.norm(), rtol=1e-7, atol=1e-13)
    assert int(solution.iterations) == solution.products == k


@given(seed=st.integers(0, 2**20), k=st.integers(1, 6))
def test_gmres_is_the_best_for_what_is_not_symmetric(seed: int, k: int) -> None:
    h, v = skewed(8, seed), vector_like(EIGHT, seed + 1)
    solution = fm.GMRES(k, tol=0.0).solve(plain(h, v), v)
    assert torch.allclose(solution.value, best(h, v, k), rtol=0, atol=1e-8 * float(v.norm()))
    assert torch.allclose(solution.residual, (v - h @ solution.value).norm() / v.norm(), rtol=1e-9)
    assert solution.products == k


@pytest.mark.parametrize("restart", [2, 3])
def test_a_restart_is_a_solve_for_what_is_left(restart: int) -> None:
    h, v = skewed(8, 3), vector_like(EIGHT, 4)
    w = torch.zeros_like(v)
    for _ in range(2):
        w = w + fm.GMRES(restart, tol=0.0).solve(plain(h, v), v - h @ w).value
    solution = fm.GMRES(2 * restart, tol=0.0, restart=restart).solve(plain(h, v), v)
    assert torch.allclose(solution.value, w, rtol=1e-11)
    assert torch.allclose(solution.residual, (v - h @ w).norm() / v.norm(), rtol=1e-10)
    assert solution.products == 2 * restart


SQUARE = {"gmres": fm.GMRES(20, tol=1e-13), "normal equations": fm.NormalEquations(fm.CG(40, tol=1e-14))}


@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", SQUARE)
def test_solves_what_is_not_symmetric(name: str, seed: int) -> None:
    h, v = skewed(6, seed), vector_like(torch.zeros(6).double(), seed + 1)
    solution = SQUARE[name].solve(plain(h, v), v)
    assert torch.allclose(h @ solution.value, v, rtol=0, atol=1e-10 * float(v.norm()))
    assert torch.allclose(solution.residual, (v - h @ solution.value).norm() / v.norm(), rtol=0, atol=1e-13)
    assert bool(solution.converged)


def test_minres_refuses_what_is_not_symmetric() -> None:
    with pytest.raises(fm.EstimatorError, match=r"MINRES solves symmetric systems, and this one .* use GMRES"):
        fm.MINRES(3).solve(plain(skewed(3, 0), torch.ones(3).double()), torch.ones(3).double())


def test_gmres_passes_a_skew_symmetric_step_without_a_gain() -> None:
    # For a rotation by 90° the first step gains nothing: ⟨v, Hv⟩ = 0.
    h, v = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.tensor([1.0, 2.0]).double()
    assert torch.allclose(fm.GMRES(5).solve(plain(h, v), v).value, h.T @ v, rtol=1e-14)
    stuck = fm.GMRES(50, restart=1).solve(plain(h, v), v)  # every cycle of one vector is the same
    assert not bool(stuck.converged)
    assert stuck.products == 1
    assert abs(float(stuck.residual) - 1.0) < 1e-14


DAMPED = {
    "minres": lambda damping: fm.MINRES(20, tol=1e-13, damping=damping),
    "gmres": lambda damping: fm.GMRES(20, tol=1e-13, damping=damping),
}


@pytest.mark.parametrize("name", DAMPED)
def test_damping_is_added_once(name: str) -> None:
    h, v = matrix(5, 1, negative=2), vector_like(torch.zeros(5).double(), 2)
    expected = torch.linalg.solve(h + 0.3 * torch.eye(5).double(), v)
    assert torch.allclose(DAMPED[name](0.3).solve(operator(h, v), v).value, expected, rtol=1e-9)


def test_damping_of_the_normal_equations_is_tikhonovs() -> None:
    h, v = skewed(5, 1), vector_like(torch.zeros(5).double(), 2)
    solution = fm.NormalEquations(fm.CG(20, tol=1e-14, damping=0.3)).solve(plain(h, v), v)
    expected = torch.linalg.solve(h.T @ h + 0.3 * torch.eye(5).double(), h.T @ v)
    assert torch.allclose(solution.value, expected, rtol=1e-10)
    assert torch.allclose(solution.residual, (v - h @ expected).norm() / v.norm(), rtol=1e-10)  # of the system itself
    assert not bool(solution.converged)


def test_products_of_the_normal_equations() -> None:
    # Hᵀv, two a step, and the residual.
    h, v = skewed(8, 1), vector_like(EIGHT, 2)
    assert fm.NormalEquations(fm.CG(3, tol=0.0)).solve(plain(h, v), v).products == 1 + 2 * 3 + 1
    without = Operator(lambda u: h @ u, like=v, symmetric=False)
    with pytest.raises(fm.EstimatorError, match=r"NormalEquations needs u ↦ Hᵀu: give the operator its transpose="):
        fm.NormalEquations(fm.CG(3)).solve(without, v)


def test_an_inconsistent_least_squares_solution_is_not_called_converged() -> None:
    h, v = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).double(), torch.tensor([2.0, 1.0]).double()
    for solver in (fm.GMRES(10), fm.NormalEquations(fm.MINRES(10))):
        solution = solver.solve(plain(h, v), v)
        assert torch.allclose(h @ solution.value, torch.tensor([2.0, 0.0]).double(), rtol=1e-12)
        assert torch.allclose(solution.residual, torch.tensor(5.0).double() ** -0.5, rtol=1e-12)
        assert not bool(solution.converged)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_preconditioned_minres_is_minres_on_the_scaled_system(k: int) -> None:
    # With M = D², the k-th iterate is D⁻¹ times that of (D⁻¹HD⁻¹) u = D⁻¹v.
    h, v = matrix(6, 1, condition=9.0, negative=2), vector_like(torch.zeros(6).double(), 2)
    d = torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0, 0.2]).double()
    ours = fm.MINRES(k, tol=0.0, preconditioner=lambda r: r / d**2).solve(operator(h, v), v)
    scaled = fm.MINRES(k, tol=0.0).solve(Operator(lambda u: (h @ (u / d)) / d, like=v), v / d)
    assert torch.allclose(ours.value, scaled.value / d, rtol=1e-9)
    assert torch.allclose(ours.residual, (v - h @ ours.value).norm() / v.norm(), rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_preconditioned_gmres_is_gmres_from_the_right(k: int) -> None:
    h, v, d = skewed(6, 1), vector_like(torch.zeros(6).double(), 2), torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0, 0.2]).double()
    ours = fm.GMRES(k, tol=0.0, preconditioner=lambda r: r / d).solve(plain(h, v), v)
    assert torch.allclose(ours.value, fm.GMRES(k, tol=0.0).solve(plain(h / d, v), v).value / d, rtol=1e-11)
    assert torch.allclose(ours.residual, (v - h @ ours.value).norm() / v.norm(), rtol=1e-10)


WARM = {
    "minres": fm.MINRES(9, tol=1e-9),
    "gmres": fm.GMRES(9, tol=1e-9),
    "restarted gmres": fm.GMRES(9, tol=1e-9, restart=3),
    "cg": fm.CG(9, tol=1e-9),
}


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
@pytest.mark.parametrize("name", WARM)
def test_a_start_at_the_solution_takes_one_product(name: str, scale: float) -> None:
    h, v = matrix(8, 0, condition=5.0), vector_like(EIGHT, 1)
    start = scale * torch.linalg.solve(h, v)  # any multiple will do: v may have grown or shrunk
    solution = WARM[name].solve(operator(h, v), v, start=start)
    assert solution.products == 1
    assert bool(solution.converged)
    assert torch.allclose(h @ solution.value, v, rtol=1e-9)


@pytest.mark.parametrize("name", ["minres", "gmres", "restarted gmres"])
def test_a_start_goes_on_and_never_does_harm(name: str) -> None:
    h, v = matrix(8, 0, condition=5.0, negative=3), vector_like(EIGHT, 1)
    cold = WARM[name].solve(operator(h, v), v)
    near = torch.linalg.solve(h, v) + 1e-4 * vector_like(EIGHT, 2)
    warm = WARM[name].solve(operator(h, v), v, start=near)
    assert float(warm.residual) < 1e-4 * float(cold.residual) or bool(warm.converged)
    assert torch.allclose(warm.residual, (v - h @ warm.value).norm() / v.norm(), rtol=1e-5, atol=1e-13)
    assert warm.products <= 10
    # What is no use as a start is left: a direction without a product, and one that is not finite.
    for useless in (torch.zeros_like(v), torch.full_like(v, torch.nan), torch.full_like(v, torch.inf)):
        again = WARM[name].solve(operator(h, v), v, start=useless)
        assert torch.isfinite(again.value).all()
        assert float(again.residual) < 1.0
    assert torch.equal(warm.carry, warm.value)


@pytest.mark.parametrize("solver", [fm.MINRES(4, tol=0.0), fm.GMRES(4, tol=0.0), fm.GMRES(4, tol=0.0, restart=2)], ids=repr)
def test_a_start_costs_one_product_more(solver: fm.LinearSolver) -> None:
    h, v = matrix(8, 0), vector_like(EIGHT, 1)
    solution = solver.solve(operator(h, v), v, start=torch.linalg.solve(h, v) + 0.1 * vector_like(EIGHT, 2))
    assert solution.products == 5
    assert int(solution.iterations) == 4


@pytest.mark.parametrize("solver", [fm.MINRES(1), fm.GMRES(1), fm.NormalEquations(fm.GMRES(1))], ids=repr)
def test_a_single_product_that_is_nan_is_not_hidden(solver: fm.LinearSolver) -> None:
    solution = solver.solve(Operator(lambda u: u * torch.nan, like=EIGHT), torch.ones_like(EIGHT))
    assert solution.value.isnan().any()


def test_a_start_in_the_null_space_does_not_bury_the_solution() -> None:
    h, v = torch.tensor([1.0, 2.0, 1e-9]), torch.tensor([1.0, 1.0, 0.0])
    noise = torch.tensor([1e-8, -1e-8, 1.0])  # its product has little to do with v
    for solver in (fm.MINRES(4), fm.GMRES(4)):
        solution = solver.solve(Operator(lambda u: h * u, like=v), v, start=noise)
        assert float(solution.value.abs().max()) < 2.0, solver


def test_memory_of_gmres_is_bounded() -> None:
    kept: list[int] = []
    h, v = torch.linspace(1.0, 1e6, 400).double(), torch.ones(400).double()
    solver, cat = fm.GMRES(120, tol=0.0), torch.cat

    def watching(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
        out = cat(tensors, dim)
        kept.append(out.shape[0] if out.ndim == 2 else 0)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", watching)
        assert solver.solve(Operator(lambda u: h * u, like=v), v).products == 120
    assert max(kept) == 51  # fifty vectors, and the image of the last


def test_each_system_of_a_map_stops_by_itself() -> None:
    h = torch.tensor([1.0, 2.0, 5.0]).double()
    v = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]).double()
    for solver in (fm.MINRES(8, tol=1e-12), fm.GMRES(8, tol=1e-12), fm.GMRES(60, tol=1e-12, restart=2)):
        ready = solver.init(Operator(lambda u: h * u, like=v[0]))
        block = ready.solve_block(v)
        if not isinstance(solver, fm.GMRES) or solver.restart is None:
            assert block.iterations.tolist() == [0, 1, 2, 3]
        assert block.converged.all()
        assert torch.allclose(block.value, v / h, rtol=1e-10)


WRONG = {
    r"MINRES\(iterations=0\): expected an integer": lambda: fm.MINRES(0),
    r"MINRES\(tol=-1.0\): expected a finite number that is not negative": lambda: fm.MINRES(1, tol=-1.0),
    r"MINRES\(damping=nan\)": lambda: fm.MINRES(1, damping=float("nan")),
    r"MINRES\(preconditioner=3\): expected a function": lambda: fm.MINRES(1, preconditioner=3),
    r"GMRES\(iterations=2.5\)": lambda: fm.GMRES(2.5),
    r"GMRES\(restart=0\): expected an integer of at least 1": lambda: fm.GMRES(3, restart=0),
    r"GMRES\(damping=-0.1\)": lambda: fm.GMRES(3, damping=-0.1),
    r"GMRES\(preconditioner='jacobi'\)": lambda: fm.GMRES(3, preconditioner="jacobi"),
    r"NormalEquations\(solver=3\): expected a linear solver such as CG\(20\)": lambda: fm.NormalEquations(3),
    r"NormalEquations\(tol=inf\)": lambda: fm.NormalEquations(fm.CG(1), tol=float("inf")),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_out_of_range(message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        WRONG[message]()
