"""torchopt: `MetaSGD` through the inner steps, `custom_root` with its linear solvers for the implicit formula."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.peers.problem import Params, Problem, costs_of, leaves, tasks_of

torchopt = importlib.import_module("torchopt")
custom_root = importlib.import_module("torchopt.diff.implicit").custom_root
solvers = importlib.import_module("torchopt.linear_solve")


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked; ITD, CG or Neumann.
        variant: none.

    Returns:
        A function without arguments.
    """
    del variant
    if problem.estimator != "itd":
        return implicit(problem)
    return maml(problem) if problem.workload.tasks else explicit(problem)


def explicit(problem: Problem) -> Callable[[], Params]:
    """Return the function that differentiates `MetaSGD`; the module's start is put back each time."""
    module, costs = Holder(problem.tensors(problem.drawn.start)), costs_of(problem)
    hyper = problem.tensors(problem.drawn.hyper)
    start = torchopt.extract_state_dict(module, by="reference")

    def call() -> Params:
        x = leaves(hyper)
        optimizer = torchopt.MetaSGD(module, lr=problem.rate)
        for _ in range(problem.steps):
            optimizer.step(module(lambda y: costs.inner(y, x)))
        found = torch.autograd.grad(module(lambda y: costs.outer(x, y)), list(x.values()))
        torchopt.recover_state_dict(module, start)
        return dict(zip(x, found, strict=True))

    return call


def maml(problem: Problem) -> Callable[[], Params]:
    """Return the function that differentiates `MetaSGD` by the start, task after task, as the documentation's MAML."""
    module, tasks = Holder(problem.tensors(problem.drawn.start)), tasks_of(problem)
    first = dict(module.named_parameters())
    start = torchopt.extract_state_dict(module, by="reference")

    def call() -> Params:
        for p in first.values():
            p.grad = None
        for task in range(len(tasks)):
            optimizer = torchopt.MetaSGD(module, lr=problem.rate)
            for _ in range(problem.steps):
                optimizer.step(module(lambda y, task=task: tasks.inner(y, task)))
            module(lambda y, task=task: tasks.outer(y, task)).backward()
            torchopt.recover_state_dict(module, start)
        return {name: torch.as_tensor(p.grad) / len(tasks) for name, p in first.items()}

    return call


def implicit(problem: Problem) -> Callable[[], Params]:
    """Return the function that solves and differentiates by `custom_root`."""
    costs, hyper = costs_of(problem), problem.tensors(problem.drawn.hyper)
    start = problem.tensors(problem.drawn.start)
    names, keys = list(start), list(hyper)
    # solve_cg takes a product for the residual of its zero start: eleven in all for ten iterations.
    if problem.estimator == "cg":
        solver = solvers.solve_cg(rtol=0.0, maxiter=problem.products)
    else:
        solver = solvers.solve_inv(ns=True, maxiter=problem.products, alpha=problem.rate)

    def stationary(params: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y = dict(zip(names, params, strict=True))
        slopes = torch.func.grad(costs.inner)(y, dict(zip(keys, x, strict=True)))
        return tuple(slopes[name] for name in names)

    @custom_root(stationary, argnums=1, solve=solver)  # type: ignore[untyped-decorator]
    def solve(params: tuple[Tensor, ...], x: tuple[Tensor, ...]) -> Any:
        y = leaves(dict(zip(names, params, strict=True)))
        at, by = tuple(y.values()), {key: p.detach() for key, p in zip(keys, x, strict=True)}
        optimizer = torch.optim.SGD(at, lr=problem.rate)
        with torch.enable_grad():
            for _ in range(problem.steps):
                optimizer.zero_grad()
                costs.inner(y, by).backward(inputs=at)  # type: ignore[no-untyped-call]
                optimizer.step()
        return tuple(p.detach() for p in at)

    def call() -> Params:
        x = leaves(hyper)
        y = solve(tuple(start.values()), tuple(x.values()))
        found = torch.autograd.grad(costs.outer(x, dict(zip(names, y, strict=True))), list(x.values()))
        return dict(zip(keys, found, strict=True))

    return call
