"""What responses of the solution claim of themselves: to be differentiable again, and to work under maps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from tests.oracles import assert_agrees, finite_difference
from tests.registry import ESTIMATORS, RELATIVE, vector_like

H = torch.tensor([1.0, 0.9]).double()
B = vector_like(torch.zeros(2, 3).double(), 1) / 3
X = vector_like(torch.zeros(3).double(), 3)
START = torch.zeros(2).double()


def loss(y: Tensor, x: Tensor) -> Tensor:
    """Strictly convex in y, with a Hessian between 0.8 and 1.1: 20 steps of rate 1 leave 0.2^20 ≈ 1e-14."""
    return (H * y**2).sum() / 2 - y @ B @ torch.sin(x) + 0.1 * torch.cos(y + x[:2]).sum()


def upper(x: Tensor, y: Tensor) -> Tensor:
    return torch.sin(2 * y).sum() + 0.1 * (x**3).sum()


LINEAR = fm.GaussNewton(lambda y: y, lambda f: (H * f**2).sum() / 2)
MORE: dict[str, fm.BestResponse] = {
    "gauss newton": fm.AID(fm.CG(8), curvature=LINEAR),
    "resampled gauss newton": fm.AID(fm.Neumann(8, scale=0.9), curvature=fm.Resampled(LINEAR)),
    "resampled gmres": fm.AID(fm.GMRES(8), curvature=fm.Resampled()),
    "damped recompute": fm.AID(fm.CG(8), curvature=fm.Damped(1e-9, fm.Hessian("recompute"))),
    "damped fixed point": fm.AID(fm.GMRES(8), curvature=fm.Damped(1e-9, fm.FixedPoint())),
    "normal fixed point": fm.AID(fm.NormalEquations(fm.CG(8)), curvature="fixed_point"),
    "direct fixed point": fm.AID(fm.Direct(), curvature="fixed_point"),
    "warm fixed point": fm.AID(fm.GMRES(8), curvature="fixed_point", warm_start=True),
    "identity fixed point": fm.AID(fm.Identity(), curvature="fixed_point"),
    "identity, difference": fm.AID(fm.Identity(), cross="finite_difference"),
    "optimizer identity, difference": fm.AID(fm.OptimizerIdentity(), cross="finite_difference"),
}
SEVERAL = {name: make(1.1, 2) for name, make in ESTIMATORS.items()} | MORE
KINDS = (fm.AID, fm.FiniteDifference, fm.SAMA, fm.OneStep)  # the others have test files of their own
ALL = {name: response for name, response in SEVERAL.items() if isinstance(response, KINDS)}
AGAIN = [name for name, response in ALL.items() if response.claims.differentiable]
ONCE = [name for name, response in ALL.items() if not response.claims.differentiable]


def objective(response: fm.BestResponse) -> Callable[[Tensor], Tensor]:
    solve = fm.argmin(loss, torchopt.sgd(1.0), steps=20, response=response)
    return lambda x: upper(x, solve(START, x))


def test_the_table_has_both_kinds() -> None:
    assert {"cg", "direct", "neumann", "gmres", "minres", "normal", "gradient steps", "nystrom", "cg warm"} <= set(AGAIN)
    assert {"fixed point", "stocbio", "damped", "cg forward", "cg cross", "sama", "one step", "identity"} <= set(ONCE)


@functools.cache
def differences() -> list[tuple[Tensor, Tensor]]:
    """The rows of the second derivative, by central differences of the gradient, with their errors."""
    gradient = torch.func.grad(objective(fm.ITD()))
    return [finite_difference(lambda x, i=i: gradient(x)[i], X, step=2e-3) for i in range(3)]


@pytest.mark.parametrize("name", AGAIN)
def test_what_is_differentiable_again_has_the_right_second_derivative(name: str) -> None:
    f = objective(ALL[name])
    for hessian in (torch.func.jacrev(torch.func.grad(f))(X), torch.autograd.functional.hessian(f, X)):
        for answer, (row, error) in zip(hessian, differences(), strict=True):
            assert_agrees(answer, row, error, relative=max(RELATIVE[name], 1e-8))


def weighted(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that meets f's gradient through its cotangent alone."""
    return lambda c: torch.func.grad(lambda x: c * f(x))(X).sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ONCE)
def test_what_is_not_says_so_and_is_never_a_silent_zero(name: str) -> None:
    f = objective(ALL[name])
    refused = rf"{type(ALL[name]).__name__}\(.*\) cannot be differentiated again \(its claims say differentiable=False\)"
    assert torch.isfinite(torch.func.grad(f)(X)).all()
    leaf = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (by_scale,) = torch.autograd.grad(scale * f(leaf), leaf, create_graph=True)
    for second in (
        lambda: torch.autograd.grad(first.sum(), leaf),
        lambda: torch.autograd.grad(by_scale.sum(), scale),
        lambda: torch.func.grad(lambda x: torch.func.grad(f)(x).sum())(X),
        lambda: torch.func.grad(weighted(f))(torch.ones(()).double()),
        lambda: torch.vmap(torch.func.jacrev(torch.func.grad(f)))(X.expand(2, 3)),
    ):
        with pytest.raises(fm.EstimatorError, match=refused):
            second()


def program(response: fm.BestResponse) -> Callable[[Tensor], Tensor]:
    """A program's hypergradient as a function of its upper parameters, with another batch in each step."""
    lower = fm.Level("y", lambda y, x, batch: loss(y, x) + (batch * y).sum(), torchopt.adam(0.3), steps=6, response=response)
    p = fm.Multilevel(lower, fm.Level("x", upper, torchopt.sgd(0.1)))
    batch = {"y": lambda t: torch.full((2,), 0.01 * t).double()}
    return lambda x: p.hypergradient(p.init({"y": START, "x": x}), batch, of="x")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")  # a map cannot warn, and its lanes one by one do
@pytest.mark.parametrize("name", ALL)
def test_mapped_programs_are_the_loop(name: str) -> None:
    assert ALL[name].claims.vmap
    gradient, points = program(ALL[name]), vector_like(torch.zeros(3, 3).double(), 7)
    mapped = torch.vmap(gradient, randomness="same")(points)
    loop = torch.stack([gradient(x) for x in points])
    # Batched kernels sum in another order; solves that lose digits to their condition lose these too.
    relative = 1e-6 if "fixed point" in name else max(RELATIVE.get(name, 0.0), 1e-10)
    assert_agrees(mapped, loop.reshape(-1), relative=relative)


def test_what_does_not_work_under_maps_says_so() -> None:
    class Unmapped(fm.LinearSolver):
        vmap = False

        def compute(self, operator, prepared, rhs, start):
            return fm.Direct().solve(operator, rhs)

    response = fm.AID(Unmapped())
    assert not response.claims.vmap
    points = vector_like(torch.zeros(3, 3).double(), 7)
    for gradient in (program(response), torch.func.grad(objective(response))):
        assert torch.isfinite(gradient(points[0])).all()
        with pytest.raises(
            fm.EstimatorError, match=r"AID\(Unmapped\(\)\) does not work under torch.func.vmap \(its claims say vmap=False\)"
        ):
            torch.vmap(gradient)(points)
