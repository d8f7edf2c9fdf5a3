"""Plain `torch.autograd`, as somebody who knows it writes it; in float64 it is the reference.

Notation: inner cost g(y, x), outer cost f(x, y), v = ∇_y f, H = ∇²_yy g, T steps of rate α.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paper_repro.peers import torch_operations
from paper_repro.peers.problem import Costs, NotOfferedError, Params, Problem, Tasks, costs_of, leaves, tasks_of

Vector = tuple[Tensor, ...]
grad = torch.autograd.grad


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked.
        variant: "" keeps the graphs of all inner steps for ITD, "recompute" their parameters only; "vmap" maps tasks.

    Returns:
        A function without arguments.

    Raises:
        NotOfferedError: there is nothing to recompute.
    """
    start, hyper = problem.tensors(problem.drawn.start), problem.tensors(problem.drawn.hyper)
    if problem.workload.tasks:
        if variant == "vmap":
            data = problem.tensors(problem.drawn.data), problem.tensors(problem.drawn.query)
            return lambda: mapped(problem, *data, start)
        if variant:
            raise NotOfferedError("recomputing is measured without tasks")
        tasks = tasks_of(problem)
        return lambda: maml(problem, tasks, start)
    if variant and problem.estimator != "itd":
        raise NotOfferedError("only ITD has something to recompute")
    method = recomputed if variant else METHODS[problem.estimator]
    costs = costs_of(problem)
    return lambda: method(problem, costs, start, hyper)


def unrolled(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return the derivative through all steps, their graphs kept."""
    x, y = leaves(hyper), leaves(start)
    for _ in range(problem.steps):
        slopes = grad(costs.inner(y, x), list(y.values()), create_graph=True)
        y = {name: p - problem.rate * slope for (name, p), slope in zip(y.items(), slopes, strict=True)}
    return dict(zip(x, grad(costs.outer(x, y), list(x.values())), strict=True))


def recomputed(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return the same; the parameters of all steps are kept, and each step is made again for one joint backward pass."""
    x, path = leaves(hyper), [leaves(start)]
    for _ in range(problem.steps):
        y = path[-1]
        slopes = grad(costs.inner(y, x), list(y.values()))
        with torch.no_grad():
            after = {name: p - problem.rate * slope for (name, p), slope in zip(y.items(), slopes, strict=True)}
        path.append({name: p.requires_grad_() for name, p in after.items()})
    y = path.pop()
    v = grad(costs.outer(x, y), list(y.values()))
    answer = [torch.zeros_like(p) for p in x.values()]
    while path:
        y = path.pop()
        slopes = grad(costs.inner(y, x), list(y.values()), create_graph=True)
        products = grad(slopes, [*y.values(), *x.values()], v)
        v = tuple(a - problem.rate * b for a, b in zip(v, products, strict=False))
        answer = [a - problem.rate * b for a, b in zip(answer, products[len(y) :], strict=True)]
    return dict(zip(x, answer, strict=True))


def solution(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return where the inner steps end; the parameters are updated in place."""
    y = leaves(start)
    for _ in range(problem.steps):
        slopes = grad(costs.inner(y, hyper), list(y.values()))
        with torch.no_grad():
            for p, slope in zip(y.values(), slopes, strict=True):
                p.sub_(slope, alpha=problem.rate)
    return y


def implicit(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return −∇²_xy g w with w ≈ H⁻¹v; one graph of the inner gradient serves all products. f does not read x."""
    y, x = solution(problem, costs, start, hyper), leaves(hyper)
    v = grad(costs.outer(x, y), list(y.values()))
    slopes = grad(costs.inner(y, x), list(y.values()), create_graph=True)

    def product(u: Tensor) -> Tensor:
        return flat(grad(slopes, list(y.values()), apart(u, v), retain_graph=True))

    solve = conjugate_gradient if problem.estimator == "cg" else neumann
    w = solve(product, flat(v), problem)
    return {name: -cross for name, cross in zip(x, grad(slopes, list(x.values()), apart(w, v)), strict=True)}


def conjugate_gradient(product: Callable[[Tensor], Tensor], v: Tensor, problem: Problem) -> Tensor:
    """Return the iterate after so many products."""
    w, r = torch.zeros_like(v), v
    p, left = r, r @ r
    for _ in range(problem.products):
        hp = product(p)
        length = left / (p @ hp)
        w, r = w + length * p, r - length * hp
        now = r @ r
        p, left = r + now / left * p, now
    return w


def neumann(product: Callable[[Tensor], Tensor], v: Tensor, problem: Problem) -> Tensor:
    """Return α Σ (I − αH)^k v with so many products and one term more."""
    total, term = v, v
    for _ in range(problem.products):
        term = term - problem.rate * product(term)
        total = total + term
    return problem.rate * total


def difference(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return −∇²_xy g v by a central difference of DARTS's length, 0.01; of 1e-5 in float64."""
    y, x = solution(problem, costs, start, hyper), leaves(hyper)
    v = grad(costs.outer(x, y), list(y.values()))
    size = (0.01 if problem.dtype == torch.float32 else 1e-5) / flat(v).norm()

    def slope(shift: Tensor) -> Vector:
        moved = {name: p.detach() + shift * part for (name, p), part in zip(y.items(), v, strict=True)}
        return grad(costs.inner(moved, x), list(x.values()))

    return {name: (b - a) / (2 * size) for name, a, b in zip(x, slope(size), slope(-size), strict=True)}


def exact_difference(problem: Problem, costs: Costs, start: Params, hyper: Params) -> Params:
    """Return what `difference` approximates: −∇²_xy g v, a double backward pass."""
    y, x = solution(problem, costs, start, hyper), leaves(hyper)
    v = grad(costs.outer(x, y), list(y.values()))
    slopes = grad(costs.inner(y, x), list(y.values()), create_graph=True)
    return {name: -cross for name, cross in zip(x, grad(slopes, list(x.values()), v), strict=True)}


def maml(problem: Problem, tasks: Tasks, shared: Params) -> Params:
    """Return the derivative of the mean query cost by the shared start, task after task."""
    total: Vector | None = None
    for task in range(len(tasks)):
        first = leaves(shared)
        y = first
        for _ in range(problem.steps):
            slopes = grad(tasks.inner(y, task), list(y.values()), create_graph=True)
            y = {name: p - problem.rate * slope for (name, p), slope in zip(y.items(), slopes, strict=True)}
        found = grad(tasks.outer(y, task), list(first.values()))
        total = found if total is None else tuple(a + b for a, b in zip(total, found, strict=True))
    assert total is not None
    return {name: part / len(tasks) for name, part in zip(shared, total, strict=True)}


def mapped(problem: Problem, support: Params, query: Params, shared: Params) -> Params:
    """Return the same by `torch.func`, all tasks at once."""
    cost = problem.workload

    def one(start: Params, support: Params, query: Params) -> Tensor:
        y = start
        for _ in range(problem.steps):
            slopes = torch.func.grad(lambda y: cost.inner(torch_operations, y, support))(y)
            y = {name: p - problem.rate * slopes[name] for name, p in y.items()}
        value: Tensor = cost.outer(torch_operations, y, query)
        return value

    def mean(start: Params) -> Tensor:
        costs: Tensor = torch.func.vmap(one, in_dims=(None, 0, 0))(start, support, query)
        return costs.mean()

    found: Params = torch.func.grad(mean)(shared)
    return found


def flat(parts: Vector) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def apart(vector: Tensor, like: Vector) -> Vector:
    """Return views of a vector's parts, shaped like other tensors."""
    parts = torch.split(vector, [p.numel() for p in like])
    return tuple(part.view_as(p) for part, p in zip(parts, like, strict=True))


METHODS = {"itd": unrolled, "cg": implicit, "neumann": implicit, "difference": difference}
