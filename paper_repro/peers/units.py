"""The units of the cost model: what a gradient and a product take by hand, in the run that is judged by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from paper_repro.peers.problem import Problem, costs_of, leaves, tasks_of

grad = torch.autograd.grad


def units(problem: Problem) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name; each is a function without arguments.

    Args:
        problem: what is asked.

    Returns:
        `gradient` of the inner cost; `graph`, the same with a graph; `product`, H u on a kept graph; `joint`, the same
        together with ∇²_xy g u; `cross`, the latter alone; `outer`, the outer cost's gradient; `slope`, ∇_x g. Of tasks
        the first five are of one task, and `joint` is `product`.
    """
    if problem.workload.tasks:
        tasks = tasks_of(problem)
        y = leaves(problem.tensors(problem.drawn.start))
        at = list(y.values())
        kept = grad(tasks.inner(y, 0), at, create_graph=True)
        u = tuple(torch.ones_like(p) for p in at)
        return {
            "gradient": lambda: grad(tasks.inner(y, 0), at),
            "joint": lambda: grad(kept, at, u, retain_graph=True),
            "outer": lambda: grad(tasks.outer(y, 0), at),
        }
    costs = costs_of(problem)
    x, y = leaves(problem.tensors(problem.drawn.hyper)), leaves(problem.tensors(problem.drawn.start))
    hyper = {name: p.detach() for name, p in x.items()}
    at, by = list(y.values()), list(x.values())
    kept = grad(costs.inner(y, x), at, create_graph=True)
    u = tuple(torch.ones_like(p) for p in at)
    found: dict[str, Callable[[], object]] = {
        "gradient": lambda: grad(costs.inner(y, hyper), at),
        "outer": lambda: grad(costs.outer(x, y), at),
    }
    if problem.estimator == "itd":
        return found | {"joint": lambda: grad(kept, [*at, *by], u, retain_graph=True)}
    if problem.estimator == "difference":
        still = {name: p.detach() for name, p in y.items()}
        return found | {"slope": lambda: grad(costs.inner(still, x), by)}
    return found | {
        "graph": lambda: grad(costs.inner(y, x), at, create_graph=True),
        "product": lambda: grad(kept, at, u, retain_graph=True),
        "cross": lambda: grad(kept, by, u, retain_graph=True),
    }


def model(problem: Problem, seconds: Mapping[str, float]) -> float:
    """Return what a hypergradient takes if nothing but its gradients and products takes time.

    Args:
        problem: what is asked.
        seconds: of each unit.

    Returns:
        ITD: T · (gradient + joint) + outer, for each task. CG and Neumann: T · gradient + outer + graph + K · product
        + cross. Difference: T · gradient + outer + 2 · slope.
    """
    steps = problem.steps * seconds["gradient"] + seconds["outer"]
    if problem.estimator == "itd":
        once = steps + problem.steps * seconds["joint"]
        return once * (len(next(iter(problem.drawn.data.values()))) if problem.workload.tasks else 1)
    if problem.estimator == "difference":
        return steps + 2 * seconds["slope"]
    return steps + seconds["graph"] + problem.products * seconds["product"] + seconds["cross"]
