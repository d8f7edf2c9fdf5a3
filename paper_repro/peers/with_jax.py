"""JAX: one jit around the whole hypergradient, `lax.scan` over inner steps, linear maps kept for all products."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from paper_repro.peers.draws import Arrays
from paper_repro.peers.problem import NotOfferedError, Problem

jax = importlib.import_module("jax")
jnp = jax.numpy
operations = importlib.import_module("paper_repro.peers.jax_operations")

Tree = Any
Method = Callable[[Tree, Tree], Tree]


def prepare(problem: Problem, variant: str) -> Callable[[], Tree]:
    """Return the function that computes the hypergradient, and waits for it.

    Args:
        problem: what is asked.
        variant: "checkpoint" keeps the parameters of each inner step for ITD and makes the step again.

    Returns:
        A function without arguments.

    Raises:
        NotOfferedError: there is nothing to checkpoint.
    """
    if variant and (problem.estimator != "itd" or problem.workload.tasks):
        raise NotOfferedError("checkpoints are for ITD without tasks")
    start = arrays(problem.drawn.start)
    if problem.workload.tasks:
        compiled = jax.jit(maml(problem))
        support, query = arrays(problem.drawn.data), arrays(problem.drawn.query)
        return lambda: jax.block_until_ready(compiled(start, support, query))
    hyper, data = arrays(problem.drawn.hyper), arrays(problem.drawn.data)

    # The data are an argument: as constants they would be folded at compile time.
    def whole(y: Tree, x: Tree, data: Tree) -> Tree:
        def inner(y: Tree, x: Tree) -> Any:
            return problem.workload.inner(operations, y, x, data)

        def outer(x: Tree, y: Tree) -> Any:
            return problem.workload.outer(operations, x, y, data)

        return METHODS[problem.estimator](problem, inner, outer, y, x, remake=bool(variant))

    compiled = jax.jit(whole)
    return lambda: jax.block_until_ready(compiled(start, hyper, data))


def arrays(given: Arrays) -> Tree:
    """Return numpy's arrays as JAX's of 32 bits."""
    kinds = {"f": np.float32, "i": np.int32, "b": np.bool_}
    return {name: jnp.asarray(array.astype(kinds[array.dtype.kind])) for name, array in given.items()}


def descent(problem: Problem, inner: Method, y: Tree, x: Tree, *, remake: bool = False) -> Tree:
    """Return where the inner steps end."""

    def step(y: Tree, _: None) -> tuple[Tree, None]:
        return moved(y, jax.grad(inner)(y, x), -problem.rate), None

    return jax.lax.scan(jax.checkpoint(step) if remake else step, y, None, length=problem.steps)[0]


def unrolled(problem: Problem, inner: Method, outer: Method, y: Tree, x: Tree, *, remake: bool) -> Tree:
    """Return the derivative through all steps."""
    return jax.grad(lambda x: outer(x, descent(problem, inner, y, x, remake=remake)))(x)


def implicit(problem: Problem, inner: Method, outer: Method, y: Tree, x: Tree, *, remake: bool) -> Tree:
    """Return −∇²_xy g w with w ≈ H⁻¹v; the inner gradient is linearized once."""
    del remake
    y = descent(problem, inner, y, x)
    v = jax.grad(outer, argnums=1)(x, y)
    _, product = jax.linearize(lambda y: jax.grad(inner)(y, x), y)
    solve = conjugate_gradient if problem.estimator == "cg" else neumann
    w = solve(product, v, problem)
    return negative(jax.vjp(lambda x: jax.grad(inner)(y, x), x)[1](w)[0])


def conjugate_gradient(product: Callable[[Tree], Tree], v: Tree, problem: Problem) -> Tree:
    """Return the iterate after so many products."""

    def iterate(_: int, at: tuple[Tree, Tree, Tree, Any]) -> tuple[Tree, Tree, Tree, Any]:
        w, r, p, left = at
        hp = product(p)
        length = left / dot(p, hp)
        w, r = moved(w, p, length), moved(r, hp, -length)
        now = dot(r, r)
        return w, r, moved(r, p, now / left), now

    zero = jax.tree.map(jnp.zeros_like, v)
    return jax.lax.fori_loop(0, problem.products, iterate, (zero, v, v, dot(v, v)))[0]


def neumann(product: Callable[[Tree], Tree], v: Tree, problem: Problem) -> Tree:
    """Return α Σ (I − αH)^k v with so many products and one term more."""

    def add(_: int, at: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        total, term = at
        term = moved(term, product(term), -problem.rate)
        return moved(total, term, 1.0), term

    total = jax.lax.fori_loop(0, problem.products, add, (v, v))[0]
    return jax.tree.map(lambda p: problem.rate * p, total)


def difference(problem: Problem, inner: Method, outer: Method, y: Tree, x: Tree, *, remake: bool) -> Tree:
    """Return −∇²_xy g v by a central difference of length 0.01."""
    del remake
    y = descent(problem, inner, y, x)
    v = jax.grad(outer, argnums=1)(x, y)
    size = 0.01 / jnp.sqrt(dot(v, v))
    up, down = (jax.grad(inner, argnums=1)(moved(y, v, shift), x) for shift in (size, -size))
    return jax.tree.map(lambda a, b: (b - a) / (2 * size), up, down)


def maml(problem: Problem) -> Callable[[Tree, Tree, Tree], Tree]:
    """Return the derivative of the mean query cost by the start: tasks by vmap, or by `lax.map`."""
    cost = problem.workload

    def one(start: Tree, task: tuple[Tree, Tree]) -> Any:
        support, query = task
        y = descent(problem, lambda y, x: cost.inner(operations, y, x), start, support)
        return cost.outer(operations, y, query)

    def mean(start: Tree, support: Tree, query: Tree) -> Any:
        if cost.together:
            return jax.vmap(lambda task: one(start, task))((support, query)).mean()
        return jax.lax.map(lambda task: one(start, task), (support, query)).mean()

    gradient: Callable[[Tree, Tree, Tree], Tree] = jax.grad(mean)
    return gradient


def moved(a: Tree, b: Tree, size: Any) -> Tree:
    """Return a + size · b."""
    return jax.tree.map(lambda p, q: p + size * q, a, b)


def dot(a: Tree, b: Tree) -> Any:
    """Return the inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda p, q: jnp.vdot(p, q), a, b)))


def negative(a: Tree) -> Tree:
    """Return −a."""
    return jax.tree.map(jnp.negative, a)


METHODS: dict[str, Callable[..., Tree]] = {
    "itd": unrolled,
    "cg": implicit,
    "neumann": implicit,
    "difference": difference,
}
