"""The Nyström approximation against its textbook form, in float32 at small damping, and as a preconditioner."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import Operator, ravel
from tests.registry import structures, vector_like
from tests.test_linear import matrix, operator


def low_rank(n: int, rank: int, seed: int = 0) -> torch.Tensor:
    """A positive semidefinite matrix with eigenvalues in [1/2, 1] besides its zeros."""
    q = torch.linalg.qr(vector_like(torch.zeros(n, n).double(), seed))[0][:, :rank]
    return q @ torch.diag(torch.linspace(0.5, 1.0, rank).double()) @ q.T


def drawn(solver: fm.Nystrom, h: torch.Tensor) -> list[int]:
    """The columns that a solver asks for."""
    asked: list[int] = []
    like = torch.zeros(len(h)).double()

    def matvec(u: torch.Tensor) -> torch.Tensor:
        assert int((u != 0).sum()) == 1
        asked.append(int(u.argmax()))
        return h @ u

    solver.init(Operator(matvec, like=like))
    return asked


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6))
def test_it_is_the_textbook_form(seed: int, rank: int) -> None:
    h, v, rho = matrix(6, seed, condition=10.0), vector_like(torch.zeros(6).double(), seed + 1), 0.1
    solver = fm.Nystrom(rank, damping=rho, seed=seed)
    columns = drawn(solver, h)
    c = h[:, columns]
    woodbury = v / rho - c @ torch.linalg.solve(c[columns] + c.T @ c / rho, c.T @ v) / rho**2
    solution = solver.solve(operator(h, v), v)
    assert torch.allclose(solution.value, woodbury, rtol=0, atol=1e-9 * float(v.norm()) / rho)
    assert solution.products == rank + 1
    true = (v - h @ solution.value - rho * solution.value).norm() / v.norm()
    assert torch.allclose(solution.residual, true, rtol=1e-9, atol=1e-13)


@given(like=structures(), seed=st.integers(0, 2**20))
def test_all_columns_give_the_damped_inverse(like: object, seed: int) -> None:
    h, v = matrix(_tree.size(like), seed), vector_like(like, seed + 1)
    solution = fm.Nystrom(100, damping=0.05).solve(operator(h, like), v)
    expected = torch.linalg.solve(h + 0.05 * torch.eye(len(h)).double(), ravel(v).double())
    assert torch.allclose(ravel(solution.value).double(), expected, rtol=0, atol=1e-9 * float(expected.norm() + 1))
    assert solution.products == len(h) + 1
    assert bool(solution.converged)


def test_float32_keeps_its_digits_at_small_damping() -> None:
    # v lies in the range of a matrix of rank 5, so w is of the order of v, and 1/ρ is of the order of ‖v‖/ε.
    h, rho = low_rank(40, 5), 1e-6
    v = h @ vector_like(torch.zeros(40).double(), 1)
    exact = torch.linalg.solve(h + rho * torch.eye(40).double(), v)
    single, u = h.float(), v.float()
    op = Operator(lambda x: single @ x, like=u)
    solver = fm.Nystrom(5, damping=rho)
    columns = [int(i) for i in drawn(solver, h)]
    c = single[:, columns]
    textbook = u / rho - c @ torch.linalg.solve(c[columns] + c.T @ c / rho, c.T @ u) / rho**2
    assert (textbook - exact).norm() > 0.05 * exact.norm()
    inverse = solver.inverse(op)
    # Rounding of v and H itself leaves ε‖v‖ outside of the range, and 1/ρ makes a tenth of it: take it from the answer.
    w = inverse(u).double()
    inside = torch.linalg.pinv(h, hermitian=True, rtol=1e-6) @ h
    # cond(M) amplifies ε: the block M of the columns is worse conditioned than H.
    worst = torch.linalg.cond(h[columns][:, columns])
    assert (inside @ w - exact).norm() <= 4 * worst.sqrt() * torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factors_are_orthonormal_and_the_inverse_symmetric(dtype: torch.dtype) -> None:
    h = matrix(8, 0).to(dtype)
    like = torch.zeros(8, dtype=dtype)
    ready = fm.Nystrom(4).init(Operator(lambda x: h @ x, like=like))
    u = ready.prepared.u
    epsilon = torch.finfo(dtype).eps
    assert torch.allclose(u.T @ u, torch.eye(4, dtype=dtype), rtol=0, atol=8 * epsilon)
    inverse = fm.Nystrom(4).inverse(Operator(lambda x: h @ x, like=like))
    dense = Operator(inverse, like=like).dense()
    assert torch.allclose(dense, dense.T, rtol=0, atol=16 * epsilon * float(dense.norm()))
    assert torch.linalg.eigvalsh(dense.double()).min() > 0


@given(seed=st.integers(0, 2**20), negative=st.integers(1, 5))
def test_negative_eigenvalues_count_as_zero(seed: int, negative: int) -> None:
    h, v = matrix(5, seed, condition=3.0, negative=negative), vector_like(torch.zeros(5).double(), seed + 1)
    solution = fm.Nystrom(5, damping=0.2).solve(operator(h, v), v)
    eigenvalues, q = torch.linalg.eigh(h)
    expected = q @ ((q.T @ v) / (eigenvalues.clamp(min=0) + 0.2))
    # M's conditioning is that of H: an indefinite block of random columns has no bound, all of them have this.
    assert torch.allclose(solution.value, expected, rtol=0, atol=1e-9 * float(v.norm()))
    assert bool(solution.negative_curvature)
    assert not bool(solution.converged)


def test_the_default_damping_is_the_least_eigenvalue() -> None:
    h = low_rank(10, 3)
    ready = fm.Nystrom(3).init(operator(h, torch.zeros(10).double()))
    assert torch.allclose(ready.prepared.damping, torch.tensor(0.5).double(), rtol=1e-9)
    more = fm.Nystrom(6).init(operator(h, torch.zeros(10).double()))  # the other three are rounding
    assert torch.allclose(more.prepared.damping, torch.tensor(0.5).double(), rtol=1e-9)
    assert int((more.prepared.eigenvalues > 0).sum()) == 3
    nothing = fm.Nystrom(2).init(Operator(torch.zeros_like, like=torch.zeros(3)))
    assert float(nothing.prepared.damping) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_no_negative_curvature(seed: int) -> None:
    # Half of the eigenvalues of M are rounding, of either sign.
    h = low_rank(12, 4, seed).float()
    ready = fm.Nystrom(8, seed=seed).init(Operator(lambda u: h @ u, like=torch.zeros(12)))
    assert not bool(ready.prepared.negative)
    assert int((ready.prepared.eigenvalues > 0).sum()) == 4


def test_the_error_falls_with_the_rank() -> None:
    q = torch.linalg.qr(vector_like(torch.zeros(40, 40).double(), 0))[0]
    h = q @ torch.diag(0.5 ** torch.arange(40).double()) @ q.T
    v = vector_like(torch.zeros(40).double(), 1)
    residuals = [float(fm.Nystrom(k, damping=1e-3).solve(operator(h, v), v).residual) for k in (2, 5, 10, 20)]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] < 1e-2  # 2⁻²⁰ ≪ ρ


@pytest.mark.parametrize("solver", [fm.CG, fm.MINRES, fm.GMRES])
def test_as_a_preconditioner_it_pays_only_its_columns(solver: type) -> None:
    # A few large eigenvalues above a flat rest: with those taken away a few steps remain.
    q = torch.linalg.qr(vector_like(torch.zeros(100, 100).double(), 0))[0]
    eigenvalues = torch.cat([torch.logspace(5, 1, 30), torch.linspace(1.0, 1.5, 70)]).double()
    h, v = q @ torch.diag(eigenvalues) @ q.T, vector_like(torch.zeros(100).double(), 1)
    op = operator(h, v)
    bare = solver(200, tol=1e-8).solve(op, v)
    ready = solver(200, tol=1e-8, preconditioner=fm.Nystrom(60)).init(op)
    aided = ready.solve(v)
    assert ready.products == 60
    assert aided.products < bare.products / 2
    assert bool(aided.converged)
    assert torch.allclose(h @ aided.value, v, rtol=0, atol=1e-6 * float(v.norm()))


def test_the_columns_follow_the_seed_alone() -> None:
    h = matrix(30, 0)
    torch.manual_seed(1)
    first, state = drawn(fm.Nystrom(5, seed=3), h), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert drawn(fm.Nystrom(5, seed=3), h) == first
    assert drawn(fm.Nystrom(5, seed=4), h) != first
    assert len(set(drawn(fm.Nystrom(30, seed=3), h))) == 30
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_column_is_as_likely() -> None:
    # 400 draws of 2 of 5: each comes 160 times on average, with a standard deviation below 10.
    counts = torch.zeros(5)
    for seed in range(400):
        counts[drawn(fm.Nystrom(2, seed=seed), torch.eye(5).double())] += 1
    assert (counts - 160).abs().max() < 40


def test_prepared_once_for_many() -> None:
    h = matrix(6, 0)
    ready = fm.Nystrom(3, damping=0.1).init(operator(h, torch.zeros(6).double()))
    block = vector_like(torch.zeros(4, 6).double(), 1)
    assert ready.products == 3
    assert ready.solve(block[0]).products == ready.solve_block(block).products == 1


WRONG = {
    r"Nystrom\(rank=0\): expected an integer of at least 1": lambda: fm.Nystrom(0),
    r"Nystrom\(damping=0.0\): expected a finite number above zero": lambda: fm.Nystrom(1, damping=0.0),
    r"Nystrom\(seed=-1\): expected an integer": lambda: fm.Nystrom(1, seed=-1),
    r"Nystrom\(seed=1.5\)": lambda: fm.Nystrom(1, seed=1.5),
    r"Nystrom\(tol=nan\)": lambda: fm.Nystrom(1, tol=float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_out_of_range(message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        WRONG[message]()
