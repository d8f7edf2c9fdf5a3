"""higher: `innerloop_ctx` and its differentiable SGD."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from paper_repro.holder import Holder
from paper_repro.peers.problem import Params, Problem, costs_of, leaves, tasks_of

higher = importlib.import_module("higher")


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked; ITD.
        variant: none.

    Returns:
        A function without arguments.
    """
    del variant
    module = Holder(problem.tensors(problem.drawn.start))
    optimizer = torch.optim.SGD(module.parameters(), lr=problem.rate)
    names = list(problem.drawn.start)
    if problem.workload.tasks:
        tasks, first = tasks_of(problem), list(module.parameters())

        def maml() -> Params:
            for p in first:
                p.grad = None
            for task in range(len(tasks)):
                with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (patched, steps):
                    for _ in range(problem.steps):
                        steps.step(patched(lambda y, task=task: tasks.inner(y, task)))
                    patched(lambda y, task=task: tasks.outer(y, task)).backward()
            return {name: torch.as_tensor(p.grad) / len(tasks) for name, p in zip(names, first, strict=True)}

        return maml
    costs, hyper = costs_of(problem), problem.tensors(problem.drawn.hyper)

    def unrolled() -> Params:
        x = leaves(hyper)
        with higher.innerloop_ctx(module, optimizer) as (patched, steps):
            for _ in range(problem.steps):
                steps.step(patched(lambda y: costs.inner(y, x)))
            found = torch.autograd.grad(patched(lambda y: costs.outer(x, y)), list(x.values()))
        return dict(zip(x, found, strict=True))

    return unrolled
