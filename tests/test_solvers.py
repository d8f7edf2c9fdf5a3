"""What every linear solver promises, on one table: a new solver joins with one line in SOLVERS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import Operator, ravel
from tests.registry import structures, vector_like
from tests.test_linear import matrix, operator, uneven


def by_leaf(r: object) -> object:
    return _tree.map(uneven, r)


# name -> a solver of systems with eigenvalues in [1/10, 1], and the relative error that it leaves there.
SOLVERS: dict[str, tuple[fm.LinearSolver, float]] = {
    "cg": (fm.CG(40, tol=1e-14), 1e-11),
    "minres": (fm.MINRES(40, tol=1e-14), 1e-11),
    "preconditioned minres": (fm.MINRES(40, tol=1e-14, preconditioner=by_leaf), 1e-11),
    "gmres": (fm.GMRES(40, tol=1e-14), 1e-11),
    "preconditioned gmres": (fm.GMRES(40, tol=1e-14, preconditioner=by_leaf), 1e-11),
    "restarted gmres": (fm.GMRES(300, tol=1e-14, restart=3), 1e-11),
    "normal equations": (fm.NormalEquations(fm.CG(60, tol=1e-15)), 1e-11),
    "direct": (fm.Direct(), 1e-11),
    # All columns: ‖(H + ρI)⁻¹ − H⁻¹‖ · ‖H‖ ≤ 10 ρ / (1/10).
    "nystrom": (fm.Nystrom(1000, damping=1e-10), 1e-8),
    # (1 − 1/10)^200 ≈ 7e-10, times the condition number.
    "neumann": (fm.Neumann(200, scale=1.0), 1e-8),
    # λ̂ ≤ λ_max, so no mode is slower than 1 − 1/10 but the top, where 1 − αλ goes down to −1 as λ̂ to λ_max/2.
    "estimated neumann": (fm.Neumann(400), 1e-8),
    "gradient steps": (fm.GradientSteps(torchopt.sgd(1.0), 200), 1e-8),
}
DENSE = torch.zeros(4).double()
NAMES = pytest.mark.parametrize("name", SOLVERS)


def system(seed: int = 0, like: object = DENSE, negative: int = 0) -> tuple[torch.Tensor, Operator, object]:
    h = matrix(_tree.size(like), seed, condition=10.0, negative=negative)
    return h, operator(h, like), vector_like(like, seed + 1)


@given(like=structures(), seed=st.integers(0, 2**20))
@NAMES
def test_solves_positive_definite_systems(name: str, like: object, seed: int) -> None:
    solver, error = SOLVERS[name]
    h, op, v = system(seed, like)
    solution = solver.solve(op, v)
    expected = torch.linalg.solve(h, ravel(v).double())
    assert _tree.mismatch(v, solution.value) is None
    assert (ravel(solution.value) - expected).norm() <= error * expected.norm()
    assert bool(solution.converged)
    assert not bool(solution.negative_curvature)


@given(like=structures((torch.float32, torch.float64, torch.bfloat16)), seed=st.integers(0, 2**20))
@NAMES
def test_leaves_keep_their_dtypes(name: str, like: object, seed: int) -> None:
    h, op, v = system(seed, like)
    solver, error = SOLVERS[name]
    solution = solver.solve(op, v)
    assert _tree.mismatch(v, solution.value) is None
    assert _tree.finite(solution.value)
    expected = torch.linalg.solve(h, ravel(v).double())
    # Every step leaves a residual of ε of the coarsest leaf, of which the condition number makes an error. `Direct` takes
    # eigenvalues below p · ε for zero: in half precision 1/10 may be one of them.
    condition = 100 if name in {"normal equations", "direct"} else 10
    error = max(error, 8 * condition * _tree.coarsest_epsilon(v))
    assert (ravel(solution.value).double() - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("name", [*SOLVERS, "identity", "optimizer identity"])
def test_a_zero_right_hand_side_gives_zero(name: str) -> None:
    others = {"identity": fm.Identity(), "optimizer identity": fm.OptimizerIdentity()}
    solver = others[name] if name in others else SOLVERS[name][0]
    solution = solver.solve(Operator(lambda u: 2 * u, like=DENSE, adapt=lambda u: u), torch.zeros_like(DENSE))
    assert torch.equal(solution.value, DENSE)
    if solver.inverts:
        assert float(solution.residual) == 0.0
        assert bool(solution.converged)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
@NAMES
def test_the_size_of_the_right_hand_side_does_not_matter(name: str, size: float) -> None:
    # In float32 the squares of these numbers are 0 or infinite.
    h = torch.tensor([[0.6, 0.3], [0.3, 0.5]])
    solution = SOLVERS[name][0].solve(Operator(lambda u: h @ u, like=torch.zeros(2)), size * torch.tensor([0.9, 0.8]))
    assert torch.allclose(solution.value / size, torch.ones(2), rtol=1e-4)  # condition number 6, float32
    assert bool(solution.converged)


KRYLOV = pytest.mark.parametrize(
    "name",
    ["cg", "minres", "preconditioned minres", "gmres", "preconditioned gmres", "restarted gmres", "nystrom", "direct"],
)


@pytest.mark.parametrize("size", [1e-25, 1e25])
@KRYLOV
def test_the_size_of_the_operator_does_not_matter(name: str, size: float) -> None:
    h = size * torch.tensor([[0.6, 0.3], [0.3, 0.5]])
    solver = SOLVERS[name][0]
    solver = replace(solver, damping=None) if name == "nystrom" else solver
    solution = solver.solve(Operator(lambda u: h @ u, like=torch.zeros(2)), torch.tensor([0.9, 0.8]))
    assert torch.isfinite(solution.value).all()
    if name != "nystrom":  # whose damping is the least eigenvalue
        assert torch.allclose(solution.value * size, torch.ones(2), rtol=1e-4)
        assert bool(solution.converged)


@NAMES
def test_a_zero_operator_has_an_answer_and_does_not_converge(name: str) -> None:
    v = torch.tensor([1.0, -2.0]).double()
    solution = SOLVERS[name][0].solve(Operator(torch.zeros_like, like=v), v)
    assert torch.isfinite(solution.value).all()
    if name != "nystrom":  # which solves (0 + ρI) w = v
        assert not bool(solution.converged)
        assert abs(float(solution.residual) - 1.0) <= 1e-15 or name == "cg"


@given(seed=st.integers(0, 2**20), negative=st.integers(1, 4))
@NAMES
@pytest.mark.filterwarnings("ignore:Neumann.* diverges:funcmlo.FuncmloWarning")
def test_indefinite_systems_have_an_honest_answer(name: str, seed: int, negative: int) -> None:
    solver = SOLVERS[name][0]
    h, op, v = system(seed, negative=negative)
    solution = solver.solve(op, v)
    assert torch.isfinite(solution.value).all()
    true = (v - h @ solution.value).norm() / v.norm()
    if bool(solution.converged):
        assert true <= 1e-3
    # A sum that was left, or a solve that stopped, knows its residual; the damping of "nystrom" adds ρ‖w‖.
    assert torch.allclose(solution.residual, true, rtol=1e-5, atol=1e-9), (solution.residual, true)
    indefinite = {"minres", "preconditioned minres", "gmres", "preconditioned gmres", "normal equations", "direct"}
    assert bool(solution.converged) or name not in indefinite
    if name in {"nystrom", "neumann", "estimated neumann", "gradient steps"}:
        assert bool(solution.negative_curvature)


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 3), inside=st.booleans())
@NAMES
def test_singular_systems(name: str, seed: int, rank: int, inside: bool) -> None:
    h, _, v = system(seed)
    eigenvalues, q = torch.linalg.eigh(h)
    eigenvalues[: 4 - rank] = 0
    h = q @ torch.diag(eigenvalues) @ q.T
    v = h @ v if inside else v
    solution = SOLVERS[name][0].solve(operator(h, v), v)
    assert torch.isfinite(solution.value).all()
    assert bool(solution.converged) == inside or name == "nystrom"
    if inside:
        assert (h @ solution.value - v).norm() <= 1e-7 * v.norm()
    elif name in {"minres", "gmres", "normal equations", "direct"}:
        # A least-squares solution: what is left of v is outside of H's range.
        assert (h @ (h @ solution.value - v)).norm() <= 1e-6 * v.norm()


@pytest.mark.parametrize("where", [0, 1])
@NAMES
def test_a_product_that_is_nan_is_not_hidden(name: str, where: int) -> None:
    products = []

    def matvec(u: torch.Tensor) -> torch.Tensor:
        products.append(u)
        return torch.tensor([0.5, 1.0]) * u * (torch.nan if len(products) > where else 1.0)

    v = torch.ones(2)
    solution = SOLVERS[name][0].solve(Operator(matvec, like=v), v)
    assert not torch.isfinite(solution.value).all()
    assert not bool(solution.converged)


@NAMES
def test_products_are_counted(name: str) -> None:
    h, count, v = matrix(4, 0, condition=10.0), [0], vector_like(DENSE, 1)

    def matvec(u: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        return h @ u

    solution = SOLVERS[name][0].solve(Operator(matvec, like=v), v)
    assert solution.products == count[0] > 0


@NAMES
def test_float32_reaches_its_own_rounding(name: str) -> None:
    h, v = matrix(6, 0, condition=10.0).float(), vector_like(torch.zeros(6), 1)
    solution = SOLVERS[name][0].solve(Operator(lambda u: h @ u, like=v), v)
    expected = torch.linalg.solve(h.double(), v.double())
    assert (solution.value - expected).norm() <= 8 * 10 * torch.finfo(torch.float32).eps * expected.norm()


@NAMES
def test_maps_over_systems(name: str) -> None:
    solver, error = SOLVERS[name]
    hs = torch.stack([matrix(4, seed, condition=10.0) for seed in range(3)])
    vs = vector_like(torch.zeros(3, 4).double(), 4)
    vs[1] = 0

    def solve(h: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        solution = solver.solve(Operator(lambda u: h @ u, like=v), v)
        return solution.value, solution.residual, solution.converged

    many, residual, converged = torch.func.vmap(solve)(hs, vs)
    expected = torch.linalg.solve(hs, vs)
    assert torch.allclose(many, expected, rtol=0, atol=error * float(expected.norm()))
    assert converged.all()
    assert float(residual[1]) == 0.0


@NAMES
def test_a_block_is_a_loop_over_its_columns(name: str) -> None:
    _, op, _ = system()
    block = vector_like(torch.zeros(3, 4).double(), 5)
    ready = SOLVERS[name][0].init(op)
    together, alone = ready.solve_block(block), [ready.solve(v) for v in block]
    assert torch.allclose(together.value, torch.stack([s.value for s in alone]), rtol=1e-12, atol=1e-13)
    assert torch.equal(together.converged, torch.stack([s.converged for s in alone]))


@NAMES
def test_works_inside_of_autograd(name: str) -> None:
    solver, error = SOLVERS[name]
    h, _, v = system()

    def total(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        w = solver.solve(Operator(lambda u: t * (h @ u), like=v), v).value
        return w.sum(), w.detach()

    expected, one = torch.linalg.solve(h, v), torch.ones(()).double()
    slope, inside = torch.func.grad(total, has_aux=True)(one)
    plain = total(one.clone().requires_grad_())[1]
    assert (torch.stack([inside, plain]) - expected).norm() <= 2 * error * expected.norm()
    # Whose steps are smooth in H, is differentiated by them: d(1ᵀ(tH)⁻¹v)/dt = −1ᵀH⁻¹v at t = 1.
    if name in {"neumann", "gradient steps"}:
        assert torch.allclose(slope, -expected.sum(), rtol=1e-5)


@NAMES
def test_not_converging_may_be_an_error(name: str) -> None:
    solver = replace(SOLVERS[name][0], throw=True)
    v = torch.ones(2).double()
    zero = Operator(torch.zeros_like, like=v)
    if name != "nystrom":
        with pytest.raises(fm.EstimatorError, match=rf"{type(solver).__name__} did not converge: relative residual 1"):
            solver.solve(zero, v)
    assert torch.isfinite(solver.solve(Operator(lambda u: u, like=v), v).value).all()
