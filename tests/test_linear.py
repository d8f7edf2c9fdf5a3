"""The linear solvers against dense solves, and on systems that have no ordinary answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import Operator, ravel, unravel
from tests.registry import structures, vector_like


def operator(matrix: torch.Tensor, like: object) -> Operator:
    return Operator(lambda u: unravel(matrix @ ravel(u).double(), like), like=like)


def matrix(n: int, seed: int, condition: float = 100.0, negative: int = 0) -> torch.Tensor:
    q = torch.linalg.qr(vector_like(torch.zeros(n, n).double(), seed))[0]
    eigenvalues = torch.logspace(0, -1, n, base=condition, dtype=torch.float64)
    eigenvalues[:negative] *= -1
    return q @ torch.diag(eigenvalues) @ q.T


def uneven(r: torch.Tensor) -> torch.Tensor:
    """A diagonal preconditioner that is no multiple of the identity."""
    return r * torch.linspace(0.5, 2.0, r.numel(), dtype=r.dtype).reshape(r.shape)


SOLVERS = {
    "cg": fm.CG(60, tol=1e-14),
    "preconditioned": fm.CG(60, tol=1e-14, preconditioner=lambda r: _tree.map(uneven, r)),
    "direct": fm.Direct(),
    "neumann": fm.Neumann(3000, scale=1.0, tol=1e-10),
}


@given(like=structures(), seed=st.integers(0, 2**20))
@pytest.mark.parametrize("name", SOLVERS)
def test_solves_positive_definite_systems(name: str, like: object, seed: int) -> None:
    h, v = matrix(_tree.size(like), seed), vector_like(like, seed + 1)
    solution = SOLVERS[name].solve(operator(h, like), v)
    expected = torch.linalg.solve(h, ravel(v).double())
    assert _tree.mismatch(v, solution.value) is None
    # ‖w − H⁻¹v‖ ≤ cond · residual · ‖H⁻¹v‖; Neumann leaves (1 − 1/100)^3001 ≈ 8e-14 of v.
    assert torch.linalg.vector_norm(ravel(solution.value) - expected) <= 1e-9 * torch.linalg.vector_norm(expected)
    assert bool(solution.converged)
    assert not bool(solution.negative_curvature)


@given(seed=st.integers(0, 2**20), k=st.integers(1, 7))
def test_cg_after_k_steps_is_the_best_in_the_krylov_space(seed: int, k: int) -> None:
    # The k-th iterate minimizes the energy norm of the error over span{v, Hv, …, H^(k−1) v}.
    h, v = matrix(8, seed, condition=10.0), vector_like(torch.zeros(8).double(), seed + 1)
    krylov = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(h, i) @ v for i in range(k)], dim=1))[0]
    best = krylov @ torch.linalg.solve(krylov.T @ h @ krylov, krylov.T @ v)
    solution = fm.CG(k, tol=0.0).solve(operator(h, v), v)
    assert torch.allclose(solution.value, best, rtol=0, atol=1e-7 * float(best.norm()))
    assert int(solution.iterations) == solution.products == k
    assert torch.allclose(solution.residual, (v - h @ solution.value).norm() / v.norm(), rtol=1e-6)


@given(seed=st.integers(0, 2**20), damping=st.floats(0.01, 1.0))
def test_damping_is_added_once(seed: int, damping: float) -> None:
    h, v = matrix(5, seed), vector_like(torch.zeros(5).double(), seed + 1)
    solution = fm.CG(40, damping=damping).solve(operator(h, v), v)
    expected = torch.linalg.solve(h + damping * torch.eye(5).double(), v)
    assert torch.allclose(solution.value, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_neumann_has_k_products_and_k_plus_one_terms(k: int) -> None:
    h, v, alpha = torch.tensor(0.8).double(), torch.tensor(1.5).double(), 0.5
    solution = fm.Neumann(k, scale=alpha).solve(Operator(lambda u: h * u, like=v), v)
    series = alpha * sum((1 - alpha * h) ** i * v for i in range(k + 1))
    assert torch.allclose(solution.value, series, rtol=1e-14)
    assert solution.products == k
    assert torch.allclose(solution.residual, (1 - alpha * h) ** k, rtol=1e-14)


def test_cg_converges_on_twice_the_identity_in_one_step() -> None:
    v = torch.tensor([3.0, -1.0])
    solution = fm.CG(10).solve(Operator(lambda u: 2 * u, like=v), v)
    assert torch.equal(solution.value, v / 2)
    assert solution.products == 1


@pytest.mark.parametrize("solver", [fm.CG(5), fm.Direct(), fm.Neumann(5, scale=0.1)], ids=repr)
def test_a_zero_right_hand_side_gives_zero(solver: fm.LinearSolver) -> None:
    v = torch.zeros(3)
    solution = solver.solve(Operator(lambda u: 2 * u, like=v), v)
    assert torch.equal(solution.value, v)
    assert float(solution.residual) == 0.0
    assert bool(solution.converged)


@given(seed=st.integers(0, 2**20), negative=st.integers(1, 6))
def test_cg_stops_at_negative_curvature_with_a_finite_answer(seed: int, negative: int) -> None:
    h, v = matrix(6, seed, condition=5.0, negative=negative), vector_like(torch.zeros(6).double(), seed + 1)
    solution = fm.CG(50).solve(operator(h, v), v)
    assert torch.isfinite(solution.value).all()
    assert solution.value.norm() > 0
    assert torch.allclose(solution.residual, (v - h @ solution.value).norm() / v.norm(), rtol=1e-6)
    # Either a flat or negative direction was met, or the right-hand side never needed one and the system is solved.
    assert bool(solution.negative_curvature) != bool(solution.converged)


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 5))
def test_singular_systems(seed: int, rank: int) -> None:
    h = matrix(6, seed, condition=5.0)
    eigenvalues, q = torch.linalg.eigh(h)
    eigenvalues[: 6 - rank] = 0
    h = q @ torch.diag(eigenvalues) @ q.T
    inside = h @ vector_like(torch.zeros(6).double(), seed + 1)
    for solver in (fm.CG(30, tol=1e-9), fm.Direct()):
        solution = solver.solve(operator(h, inside), inside)
        assert bool(solution.converged), solver
        assert torch.allclose(h @ solution.value, inside, rtol=0, atol=1e-7 * float(inside.norm()))
    outside = vector_like(torch.zeros(6).double(), seed + 2)
    for solver in (fm.CG(30, tol=1e-9), fm.Direct()):
        solution = solver.solve(operator(h, outside), outside)
        assert torch.isfinite(solution.value).all()
        assert not bool(solution.converged)
        # An inconsistent system has no solution to converge to; the stats tell the truth about where it stopped.
        assert torch.allclose(solution.residual, (outside - h @ solution.value).norm() / outside.norm(), rtol=1e-5)


def test_float32_reaches_its_own_rounding() -> None:
    h, v = matrix(6, 0, condition=10.0).float(), vector_like(torch.zeros(6), 1)
    solution = fm.CG(30).solve(Operator(lambda u: h @ u, like=v), v)
    assert float(solution.residual) < 1e-6
    assert torch.allclose(solution.value, torch.linalg.solve(h, v), rtol=1e-4, atol=1e-5)


def test_solvers_work_under_vmap() -> None:
    h, v = matrix(4, 3, condition=5.0), vector_like(torch.zeros(3, 4).double(), 4)
    for solver in (fm.CG(8, tol=1e-12), fm.Direct(), fm.Neumann(200, scale=1.0)):
        many = torch.func.vmap(lambda b, s=solver: s.solve(Operator(lambda u: h @ u, like=b), b).value)(v)
        assert torch.allclose(many, torch.linalg.solve(h, v.T).T, rtol=1e-8), solver


def test_direct_solves_what_is_not_symmetric() -> None:
    h = torch.tensor([[1.0, 2.0], [0.0, 3.0]]).double()
    v = torch.tensor([1.0, 3.0]).double()
    solution = fm.Direct().solve(Operator(lambda u: h @ u, like=v, symmetric=False), v)
    assert torch.allclose(solution.value, torch.tensor([-1.0, 1.0]).double(), rtol=1e-12)


@given(like=structures((torch.float32, torch.float64)), seed=st.integers(0, 2**20))
def test_dense_and_product_agree_and_are_symmetric(like: object, seed: int) -> None:
    h = matrix(_tree.size(like), seed)
    dense = operator(h, like).dense()
    assert torch.allclose(dense.double(), h, rtol=1e-5, atol=1e-6)
    u, v = vector_like(like, seed), vector_like(like, seed + 1)
    left, right = _tree.dot(operator(h, like)(u), v), _tree.dot(u, operator(h, like)(v))
    assert torch.allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
@pytest.mark.parametrize("solver", [fm.CG(5), fm.Direct()], ids=repr)
def test_the_size_of_the_right_hand_side_does_not_matter(solver: fm.LinearSolver, size: float) -> None:
    # In float32 the squares of these numbers are 0 or infinite.
    h = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    solution = solver.solve(Operator(lambda u: h @ u, like=torch.zeros(2)), size * torch.tensor([5.0, 5.0]))
    assert torch.allclose(solution.value / size, torch.tensor([1.0, 2.0]), rtol=1e-5)
    assert bool(solution.converged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_not_taken_for_negative_curvature(dtype: torch.dtype) -> None:
    h, v = torch.tensor([1.0, 0.25], dtype=dtype), torch.ones(2, dtype=dtype)
    solution = fm.CG(10).solve(Operator(lambda u: h * u, like=v), v)
    assert torch.allclose(solution.value.float(), torch.tensor([1.0, 4.0]), rtol=0.05)
    assert not bool(solution.negative_curvature)


def test_half_precision_bears_small_right_hand_sides() -> None:
    h, v = torch.tensor([2.0, 0.5], dtype=torch.float16), torch.full((2,), 1e-5, dtype=torch.float16)
    solution = fm.CG(10).solve(Operator(lambda u: h * u, like=v), v)  # 1/‖v‖ is beyond float16
    assert torch.allclose(solution.value.float(), v.float() / h.float(), rtol=0.05)


def test_a_right_hand_side_below_the_normal_numbers_counts_as_zero() -> None:
    v = torch.full((2,), 1e-45)
    solution = fm.CG(10).solve(Operator(lambda u: 2 * u, like=v), v)
    assert torch.equal(solution.value, torch.zeros(2))
    assert bool(solution.converged)


@pytest.mark.parametrize("where", [0, 1])
def test_a_product_that_is_nan_is_not_hidden(where: int) -> None:
    products = []

    def matvec(u: torch.Tensor) -> torch.Tensor:
        products.append(u)
        return torch.tensor([1.0, 2.0]) * u * (torch.nan if len(products) > where else 1.0)

    v = torch.ones(2)
    solution = fm.CG(4).solve(Operator(matvec, like=v), v)
    assert not torch.isfinite(solution.value).any()
    assert not bool(solution.converged)


def test_direct_trusts_a_mixed_tree_no_further_than_its_coarsest_leaf() -> None:
    like = {"a": torch.zeros(2), "b": torch.zeros(2).double()}
    q = torch.linalg.qr(vector_like(torch.zeros(4, 4).double(), 0))[0]
    h = torch.outer(q[:, 0], q[:, 0])  # rank one: H⁺v = q ⟨q, v⟩, and q holds float32's rounding in the columns of b
    v = vector_like(like, 1)
    solution = fm.Direct().solve(operator(h, like), v)
    expected = q[:, 0] * (q[:, 0] @ ravel(v))
    assert torch.allclose(ravel(solution.value), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_cgs_tolerance_is_relative_to_the_right_hand_side(size: float) -> None:
    h, v = torch.linspace(1.0, 9.0, 20).double(), size * vector_like(torch.zeros(20).double(), 1)
    solution = fm.CG(20, tol=0.1).solve(Operator(lambda u: h * u, like=v), v)
    same = fm.CG(20, tol=0.1).solve(Operator(lambda u: h * u, like=v), v / size)
    assert (solution.products, bool(solution.converged)) == (same.products, True)
    assert 1 < solution.products < 10
    assert torch.allclose(solution.residual, same.residual, rtol=1e-9)
    assert float(solution.residual) <= 0.1


def test_cg_does_not_go_on_below_rounding() -> None:
    h, v = torch.linspace(1.0, 3.0, 40), vector_like(torch.zeros(40), 1)
    solution = fm.CG(1000, tol=0.0).solve(Operator(lambda u: h * u, like=v), v)
    assert bool(solution.converged)
    assert solution.products < 40
    assert 0.0 < float(solution.residual) <= 2 * torch.finfo(torch.float32).eps


def test_a_direction_without_curvature_is_never_called_converged() -> None:
    v = torch.tensor([1.0, 2.0]).double()
    solution = fm.CG(3, tol=1.0).solve(Operator(torch.zeros_like, like=v), v)
    assert bool(solution.negative_curvature)
    assert not bool(solution.converged)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_preconditioned_cg_is_cg_on_the_scaled_system(k: int) -> None:
    # With M = D², the k-th iterate is D⁻¹ times that of (D⁻¹HD⁻¹) u = D⁻¹v. A multiple of the identity, as in SOLVERS,
    # changes no iterate whether or not it is applied.
    q = torch.linalg.qr(vector_like(torch.zeros(6, 6).double(), 1))[0]
    h, v = q @ torch.diag(torch.linspace(1.0, 9.0, 6).double()) @ q.T, vector_like(torch.zeros(6).double(), 2)
    d = torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0, 0.2]).double()
    ours = fm.CG(k, tol=0.0, preconditioner=lambda r: r / d**2).solve(Operator(lambda u: h @ u, like=v), v)
    scaled = fm.CG(k, tol=0.0).solve(Operator(lambda u: (h @ (u / d)) / d, like=v), v / d)
    assert torch.allclose(ours.value, scaled.value / d, rtol=1e-9)
    assert torch.allclose(ours.residual, (v - h @ ours.value).norm() / v.norm(), rtol=1e-6, atol=1e-13)


def test_cg_counts_the_iterations_of_each_system() -> None:
    h = torch.tensor([1.0, 2.0, 5.0]).double()
    v = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]).double()
    solver = fm.CG(8, tol=1e-12)
    counts = torch.func.vmap(lambda b: solver.solve(Operator(lambda u: h * u, like=b), b).iterations)(v)
    assert counts.tolist() == [0, 1, 2, 3]


def test_direct_gives_a_singular_system_its_solution_of_least_norm() -> None:
    q = torch.linalg.qr(vector_like(torch.zeros(6, 6).double(), 3))[0]
    h = q @ torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, -3.0, 4.0]).double()) @ q.T
    v = vector_like(torch.zeros(6).double(), 4)
    solution = fm.Direct().solve(Operator(lambda u: h @ u, like=v), v)
    expected = q @ (torch.tensor([0.0, 0.0, 1.0, 1 / 2, -1 / 3, 1 / 4], dtype=torch.float64) * (q.T @ v))
    assert torch.allclose(solution.value, expected, rtol=1e-10, atol=1e-12)
    assert not bool(solution.converged)


def test_neumann_says_whether_it_converged() -> None:
    # One mode with 1 − αλ = 1/2: the residual after K terms is 2^−K.
    v = torch.ones(2).double()
    for k, converged in ((9, False), (10, True)):
        solution = fm.Neumann(k, scale=0.5).solve(Operator(lambda u: 1.0 * u, like=v), v)
        assert float(solution.residual) == 2.0**-k
        assert bool(solution.converged) is converged  # tol = 10⁻³
