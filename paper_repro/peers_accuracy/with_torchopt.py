"""torchopt: `custom_root` with its solvers, and its meta-optimizer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings

torchopt = importlib.import_module("torchopt")
implicit = importlib.import_module("torchopt.diff.implicit")
solvers = importlib.import_module("torchopt.linear_solve")

LARGEST = 0.6
"""A bound on the Hessian's largest eigenvalue along the course; a Neumann series takes its inverse for a scale."""


def _root(solver: Callable[[Knobs], Any]) -> Callable[[Cleaning, Settings, Knobs], Answer]:
    def method(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
        y = {name: p.requires_grad_() for name, p in problem.classifier().items()}
        names, leaves = list(y), list(y.values())
        optimizer = torch.optim.SGD(leaves, lr=settings.lower_lr, momentum=settings.momentum)

        def stationary(params: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
            slopes = torch.func.grad(problem.lower)(dict(zip(names, params, strict=True)), x)
            return tuple(slopes[name] for name in names)

        def answer(x: Tensor, steps: int) -> Tensor:
            @implicit.custom_root(stationary, argnums=1, solve=solver(knobs))  # type: ignore[untyped-decorator]
            def solve(start: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
                del start  # the parameters themselves go on
                fixed = x.detach()
                with torch.enable_grad():
                    for _ in range(steps):
                        optimizer.zero_grad()
                        problem.lower(y, fixed).backward(inputs=leaves)  # type: ignore[no-untyped-call]
                        optimizer.step()
                return tuple(p.detach().clone() for p in leaves)

            x = x.clone().requires_grad_()
            found = solve(tuple(p.detach() for p in leaves), x)
            return torch.autograd.grad(problem.upper(x, dict(zip(names, found, strict=True))), x)[0]

        return answer

    return method


def explicit(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the derivative through `MetaSGD`, whose graph is cut between outer steps."""
    del knobs
    module = Holder(problem.classifier())
    optimizer = torchopt.MetaSGD(module, lr=settings.lower_lr, momentum=settings.momentum)

    def answer(x: Tensor, steps: int) -> Tensor:
        x = x.clone().requires_grad_()
        for _ in range(steps):
            optimizer.step(module(lambda y: problem.lower(y, x)))
        found = torch.autograd.grad(module(lambda y: problem.upper(x, y)), x)[0]
        torchopt.stop_gradient(module)
        torchopt.stop_gradient(optimizer)
        return found

    return answer


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {
    "torchopt-cg": _root(lambda knobs: solvers.solve_cg(rtol=0.0, atol=0.0, maxiter=int(knobs.linear))),
    "torchopt-neumann": _root(lambda knobs: solvers.solve_inv(ns=True, maxiter=int(knobs.linear), alpha=1 / LARGEST)),
    "torchopt-itd": explicit,
}
