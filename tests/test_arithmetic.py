"""The two ways in which a solver computes: with numbers and in place, or with tensors and nothing written to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmlo as fm
from funcmlo import _leaves, _tree

LARGE = 2**17 + 3  # more than the entries from which memory is used again, and than a block of a sum
SOLVERS: dict[str, fm.LinearSolver] = {
    "cg": fm.CG(6, tol=0.0),
    "cg-preconditioned": fm.CG(6, tol=0.0, preconditioner=lambda r: _tree.scale(0.5, r)),
    "cg-identity": fm.CG(6, tol=0.0, preconditioner=lambda r: r),
    "neumann": fm.Neumann(6, scale=0.2),
}


def problem(dtype: torch.dtype = torch.float64, sign: float = 1.0) -> tuple[fm.Operator, Any, list[Tensor]]:
    """A diagonal operator on a tree of a large and a small leaf, a right-hand side, and all that the operator saw."""
    spectrum = {
        "a": sign * torch.linspace(1, 3, LARGE, dtype=dtype),
        "b": sign * torch.linspace(2, 3, LARGE // 2, dtype=dtype),
    }
    seen: list[Tensor] = []

    def product(u: Any) -> Any:
        seen.extend(_tree.leaves(u))
        return _tree.map(torch.mul, spectrum, u)

    v = _tree.map(lambda x: torch.cos(x * 1e4), spectrum)
    return fm.Operator(product, like=v), v, seen


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_known_values_give_the_same_solution(name: str, sign: float) -> None:
    operator, v, _ = problem(sign=sign)
    with torch.no_grad(), pytest.warns(fm.FuncmloWarning) if name == "neumann" and sign < 0 else torch.no_grad():
        known = SOLVERS[name].solve(operator, v)
    with torch.enable_grad(), pytest.warns(fm.FuncmloWarning) if name == "neumann" and sign < 0 else torch.enable_grad():
        traced = SOLVERS[name].solve(operator, v)
    # Both sum 200,000 squares in another order: a few epsilons, which six iterations carry on.
    for x, y in zip(_tree.leaves(known.value), _tree.leaves(traced.value), strict=True):
        assert torch.allclose(x, y, rtol=1e-11, atol=1e-13)
    assert known.products == traced.products
    for statistic in ("iterations", "residual", "converged", "negative_curvature"):
        one, other = getattr(known, statistic), getattr(traced, statistic)
        assert one.dtype == other.dtype
        assert torch.allclose(one.double(), other.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_is_written_to_that_someone_else_holds(name: str) -> None:
    operator, v, seen = problem()
    right, kept = _tree.map(torch.clone, v), []

    def watching(u: Any) -> Any:
        kept.append(_tree.map(torch.clone, u))
        return operator(u)

    with torch.no_grad():
        solution = SOLVERS[name].solve(fm.Operator(watching, like=v), v)
        again = SOLVERS[name].solve(operator, v)
    assert all(map(torch.equal, _tree.leaves(v), _tree.leaves(right)))
    assert all(map(torch.equal, seen, 2 * _tree.leaves(kept)))
    assert all(map(torch.equal, _tree.leaves(solution.value), _tree.leaves(again.value)))


def test_an_operator_may_answer_with_what_it_was_given() -> None:
    v = torch.cos(torch.arange(LARGE, dtype=torch.float64))
    with torch.no_grad():
        solution = fm.CG(3).solve(fm.Operator(lambda u: u.view(-1), like=v), v)
        series = fm.Neumann(3, scale=0.5).solve(fm.Operator(lambda u: u, like=v), v)
    assert torch.allclose(solution.value, v, rtol=1e-14)
    assert torch.allclose(series.value, v * (1 - 0.5**4), rtol=1e-14)


def test_memory_is_used_again_only_where_nobody_else_holds_it() -> None:
    alone = [torch.zeros(LARGE)]
    assert _leaves.unshared(alone)
    for hold in (lambda x: x, lambda x: x.view(-1), lambda x: x[:2], lambda x: x.detach(), lambda x: x.untyped_storage()):
        held = hold(alone[0])
        assert not _leaves.unshared(alone)
        del held
        assert _leaves.unshared(alone)
    graph = alone[0] * torch.ones(LARGE, requires_grad=True)  # which saves it for its backward pass
    assert not _leaves.unshared(alone)
    del graph
    assert _leaves.unshared(alone)
    assert not _leaves.unshared([torch.zeros(3)])


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("n", [5, LARGE])
def test_norms_neither_overflow_nor_underflow_nor_lose_digits(size: float, n: int) -> None:
    x = torch.full((n,), size)
    expected = float(torch.tensor(size)) * math.sqrt(n)
    for tree in (x, [x[: n // 2], x[n // 2 :].double()], [x[: n // 2], x[n // 2 :]]):
        assert math.isclose(float(_tree.norm(tree)), expected, rel_tol=3e-7)
    assert math.isclose(float(torch.func.vmap(_tree.norm)(x[None])[0]), expected, rel_tol=3e-7)


def test_sums_of_many_float32_entries_keep_their_digits() -> None:
    x = torch.rand(2**23, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = float(torch.dot(x.double(), x.double()))
    # A sum in one go is off by 1e-5 and more; blocks of 65,536 by a few times 1e-7.
    assert math.isclose(float(_tree.dot(x, x)), exact, rel_tol=2e-6)
    assert math.isclose(float(_tree.norm(x)), math.sqrt(exact), rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finiteness_is_exact_where_the_sum_overflows(dtype: torch.dtype) -> None:
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert _tree.finite(largest)
    for bad in (torch.inf, -torch.inf, torch.nan):
        at = largest.clone()
        at[7] = bad
        assert not _tree.finite([largest, at])
        assert not _tree.finite([at, largest])
