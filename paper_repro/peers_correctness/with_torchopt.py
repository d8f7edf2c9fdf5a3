"""torchopt: its meta-optimizers, `custom_root` with each linear solver, and `ImplicitMetaGradientModule`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paper_repro.holder import Holder
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Question, torch_optimizer

torchopt = importlib.import_module("torchopt")
implicit = importlib.import_module("torchopt.diff.implicit")
solvers = importlib.import_module("torchopt.linear_solve")

Solver = Callable[[Question], Any]


def explicit(question: Question) -> Tensor:
    """Return the derivative through `MetaSGD` or `MetaAdam`."""
    module, x = Holder(question.start), question.x.detach().clone().requires_grad_()
    if question.optimizer == "adam":
        optimizer = torchopt.MetaAdam(module, lr=question.rate)
    else:
        optimizer = torchopt.MetaSGD(module, lr=question.rate, momentum=0.9 if question.optimizer == "momentum" else 0.0)
    for _ in range(question.steps):
        optimizer.step(module(lambda y: question.inner(y, x)))
    return torch.autograd.grad(module(lambda y: question.outer(x, y)), x)[0]


def descend(question: Question, module: nn.Module, cost: Callable[[], Tensor]) -> None:
    """Run the inner loop in place, as the documentation's `solve` does."""
    params = tuple(module.parameters())
    optimizer = torch_optimizer(question, params)
    with torch.enable_grad():
        for _ in range(question.steps):
            optimizer.zero_grad()
            cost().backward(inputs=params)  # type: ignore[no-untyped-call]
            optimizer.step()


def root(solver: Solver) -> Callable[[Question], Tensor]:
    """Return the method that differentiates a solution by `custom_root` with a linear solver."""

    def call(question: Question) -> Tensor:
        names = list(question.start)

        def stationary(params: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            slopes = torch.func.grad(question.inner)(dict(zip(names, params, strict=True)), x)
            return tuple(slopes[name] for name in names)

        @implicit.custom_root(stationary, argnums=1, solve=solver(question))  # type: ignore[untyped-decorator]
        def solve(params: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            module = Holder(dict(zip(names, params, strict=True)))
            descend(question, module, lambda: module(lambda y: question.inner(y, x.detach())))
            return tuple(p.detach() for p in module.parameters())

        x = question.x.detach().clone().requires_grad_()
        y = solve(tuple(question.start.values()), x)
        return torch.autograd.grad(question.outer(x, dict(zip(names, y, strict=True))), x)[0]

    return call


def module_method(solver: Solver) -> Callable[[Question], Tensor]:
    """Return the method that differentiates a solution by an `ImplicitMetaGradientModule`."""

    def call(question: Question) -> Tensor:
        class Lower(implicit.ImplicitMetaGradientModule, linear_solve=solver(question)):  # type: ignore[misc, name-defined, call-arg]
            def __init__(self, x: Tensor) -> None:
                super().__init__()
                self.x = x
                self.holder = Holder(question.start)

            def objective(self) -> Tensor:
                value: Tensor = self.holder(lambda y: question.inner(y, self.x))
                return value

            def solve(self) -> Any:
                descend(question, self, self.objective)
                return self

        x = question.x.detach().clone().requires_grad_()
        lower = Lower(x)
        lower.solve()
        return torch.autograd.grad(lower.holder(lambda y: question.outer(x, y)), x)[0]

    return call


def _rtol(question: Question) -> float:
    """Return a tolerance that the dtype can reach."""
    return 1e-12 if question.x.dtype == torch.float64 else 1e-6


def _cg(question: Question) -> Any:
    return solvers.solve_cg(rtol=_rtol(question), maxiter=4 * question.size)


def _normal_cg(question: Question) -> Any:
    return solvers.solve_normal_cg(rtol=_rtol(question), maxiter=10 * question.size)


def _neumann(question: Question) -> Any:
    return solvers.solve_inv(ns=True, maxiter=question.terms, alpha=1 / question.curvature)


METHODS = (
    Method("MetaSGD, MetaAdam", "unrolled", explicit, uses_rate=True),
    Method("custom_root, solve_cg", "implicit", root(_cg)),
    Method("custom_root, solve_normal_cg", "implicit", root(_normal_cg)),
    Method("custom_root, solve_inv", "implicit", root(lambda q: solvers.solve_inv())),
    Method("custom_root, solve_inv(ns)", "implicit", root(_neumann)),
    Method("ImplicitModule, solve_cg", "implicit", module_method(_cg)),
)
