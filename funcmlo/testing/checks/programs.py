"""Does an estimator do in programs, under maps and differentiated again, what it does alone?"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torchopt
from torch import Tensor

from funcmlo import _tree
from funcmlo._argmin import argmin
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel
from funcmlo.testing.checks.base import Check, any_level, check, settled, sized
from funcmlo.testing.checks.products import judged
from funcmlo.testing.examined import Examined
from funcmlo.testing.matrices import cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding


@check(any_level, sized)
def direct_gradient_missing(examined: Examined) -> Finding:
    """dF/dx = ∇_x f + Jᵀ∇_y f: an upper cost's own gradient is in the hypergradient once."""
    x, b = normal(flat(3), examined.seed), cross(3, 3, examined.seed + 1)
    w, examined = normal(flat(3), examined.seed + 2), examined.converged
    program = Multilevel(
        Level("y", lambda y, x: 0.5 * y @ y - y @ (b @ x), torchopt.sgd(1.0), steps=2, response=examined.estimator),
        Level("x", lambda x, y: 0.5 * x @ x + w @ y, torchopt.sgd(0.1)),
    )
    answer = examined.program_answer(program, {"y": flat(3), "x": x})
    indirect = b.T @ w / (1 + examined.damping)
    told = "the hypergradient is not ∇_x f + Jᵀ∇_y f"
    for times, what in ((0.0, "without ∇_x f"), (2.0, "with ∇_x f twice")):
        near = 1e-3 * float(x.norm()) + answer.noise
        told += f"; it is that {what}" if float((answer.value - indirect - times * x).norm()) < near else ""
    return judged(examined, answer, x + indirect, 1.0, told)


@check(any_level, sized)
def path_counted_twice(examined: Examined) -> Finding:
    """Two paths that share their first edge, x → first → second, third: each adds its product once."""
    n = 2
    x, w, z = (normal(flat(n), examined.seed + i) for i in range(3))
    b, c, d = (cross(n, n, examined.seed + i) / 2 for i in range(3))
    examined = examined.converged

    def solution(name: str, matrix: Tensor, source: str) -> Level:
        def cost(own: Tensor, above: Tensor) -> Tensor:
            return 0.5 * own @ own - own @ (matrix @ above)

        return Level(name, cost, torchopt.sgd(1.0), steps=2, response=examined.estimator, reads={"above": source})

    program = Multilevel(
        solution("first", b, "x"),
        solution("second", c, "first"),
        solution("third", d, "first"),
        Level("x", lambda x, second, third: 0.5 * x @ x + w @ second + z @ third, torchopt.sgd(0.1)),
    )
    answer = examined.program_answer(program, {"first": flat(n), "second": flat(n), "third": flat(n), "x": x})
    scale = 1 / (1 + examined.damping) ** 2
    paths = {"second": scale * b.T @ c.T @ w, "third": scale * b.T @ d.T @ z}
    expected = x + paths["second"] + paths["third"]
    told = "the hypergradient is not ∇_x f and one product for each of the two paths"
    for name, product in paths.items():
        for times, what in ((1, "twice"), (-1, "not at all")):
            if float((answer.value - expected - times * product).norm()) < 1e-3 * float(product.norm()) + answer.noise / 2:
                told += f"; the path through '{name}' is in it {what}"
    return judged(examined, answer, expected, 1.0, told)


@check(any_level, settled, lambda e: None if e.claims.vmap else "its claims say vmap=False")
def mapped(examined: Examined) -> Finding:
    """Under torch.func.vmap the answers are those of a loop."""
    gradient, points = _gradient(examined), normal(torch.zeros(3, 2, dtype=torch.float64), examined.seed)
    loop = torch.stack([gradient(x) for x in points])
    try:
        found = torch.vmap(gradient)(points)
    except Exception as error:  # whatever a user's code raises there
        why = str(error).splitlines()[0]
        return Finding(math.inf, 0.0, f"under torch.func.vmap: {why}; where that is meant, claim fm.Claims(vmap=False)")
    # Batched kernels sum in another order, and differences divide that by their size.
    allowed = max(1e-8, examined.accuracy)
    return Finding(float((found - loop).norm() / loop.norm()), allowed, "the answers under vmap are not those of a loop")


@check(any_level, settled, lambda e: None if e.claims.differentiable else "its claims say differentiable=False")
def second_derivative(examined: Examined) -> Finding:
    """The derivative of the hypergradient is that of its central differences."""
    examined = examined.converged
    gradient, x = _gradient(examined), normal(flat(2), examined.seed)
    direction = normal(flat(2), examined.seed + 1)
    h = 1e-3

    def difference(h: float) -> Tensor:
        return (gradient(x + h * direction) - gradient(x - h * direction)) / (2 * h)

    expected = (4 * difference(h / 2) - difference(h)) / 3  # O(h⁴) and rounding / h: about 1e-11
    # The derivative is a Hessian, if the gradient is exact, so its transpose is itself.
    found = torch.func.grad(lambda x: gradient(x) @ direction)(x)
    told = "the derivative of the hypergradient is not that of its differences"
    away = float((found.detach() - expected).norm() / expected.norm())
    return Finding(away, max(1e-6, examined.accuracy), told)


@check(any_level)
def steps_in_a_program(examined: Examined) -> Finding:
    """Two outer steps with Adam below: everything finite, the state of the same shape, and nothing handed in changed."""
    a, b = symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)
    program = Multilevel(
        Level(
            "y",
            lambda y, x: 0.5 * y["a"] @ a @ y["a"] - y["a"] @ (b @ x),
            torchopt.adam(0.1),
            steps=3,
            response=examined.estimator,
        ),
        Level("x", lambda x, y: torch.sin(y["a"]).sum() + 0.1 * x @ x, torchopt.adam(0.1)),
    )
    state = program.init({"y": {"a": normal(flat(3), examined.seed)}, "x": normal(flat(2), examined.seed)})
    begin, first = state, ravel(state.params["x"]).clone()
    for _ in range(2):
        before, (state, _) = state, program.step(state, {})
        if _tree.structure(state.response) != _tree.structure(before.response):
            return Finding(math.inf, 0.0, "the estimator's state changed its structure from step to step")
        if not _tree.finite(state):
            return Finding(math.inf, 0.0, "something is no longer finite")
    if not torch.equal(first, ravel(begin.params["x"])):
        return Finding(math.inf, 0.0, "the state that was handed in has changed")
    return Finding(float(torch.equal(first, ravel(state.params["x"]))), 0.0, "the level above did not move")


def _gradient(examined: Examined) -> Callable[[Tensor], Tensor]:
    """The gradient of Σ sin y*(x), whose solution bends with x."""
    a, b = symmetric(3, 2.0, examined.seed), cross(3, 2, examined.seed) / 10

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return 0.5 * y @ a @ y - torch.sin(y) @ (b @ x) - y.sum()

    solve = argmin(loss, torchopt.sgd(1.0), steps=60, response=examined.estimator)
    objective = torch.func.grad(lambda x: torch.sin(solve(flat(3), x)).sum())
    found: Callable[[Tensor], Tensor] = objective
    return found


CHECKS: tuple[Check, ...] = (
    direct_gradient_missing,
    path_counted_twice,
    mapped,
    second_derivative,
    steps_in_a_program,
)
