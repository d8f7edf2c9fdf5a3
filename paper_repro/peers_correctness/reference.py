"""The answers: dense formulas and a differentiated loop, written out in plain torch, in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paper_repro.peers_correctness.problem import Params, Question, Target

BETA_1, BETA_2, EPSILON, MOMENTUM = 0.9, 0.999, 1e-8, 0.9


def flat(params: Params) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.reshape(-1) for p in params.values()])


def like(vector: Tensor, params: Params) -> Params:
    """Return a vector as parameters of these names and shapes."""
    pieces = torch.split(vector, [p.numel() for p in params.values()])
    return {name: piece.reshape(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}


def answer(question: Question, target: Target) -> Tensor:
    """Return the hypergradient that a method of this target should give, in float64.

    Args:
        question: the problem.
        target: what the method says that it computes. At a converged solution the unrolled steps give the implicit one.

    Returns:
        A tensor like x.
    """
    if question.solution is None:
        return unrolled(question)
    x, y = question.x.double(), flat(question.solution).double()
    direct, v = torch.func.grad(_outer(question), argnums=(0, 1))(x, y)
    slope = torch.func.grad(_inner(question))
    w = v if target in {"identity", "one step"} else torch.linalg.solve(torch.func.jacrev(slope)(y, x), v)
    product = torch.func.grad(lambda at: torch.dot(slope(y, at), w))(x)
    hypergradient: Tensor = direct - (question.rate if target == "one step" else 1.0) * product
    return hypergradient


def parts(question: Question, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ∇_x f, ∇_y f, ∇²_yy g and ∇²_yx g at a point, dense, in float64: what explains a wrong answer.

    Args:
        question: the problem.
        y: the lower parameters as one vector.

    Returns:
        A vector like x, one like y, a matrix (y, y) and a matrix (y, x).
    """
    x, y = question.x.double(), y.double()
    direct, v = torch.func.grad(_outer(question), argnums=(0, 1))(x, y)
    slope = torch.func.grad(_inner(question))
    hessian, cross = torch.func.jacrev(slope, argnums=(0, 1))(y, x)
    return direct, v, hessian, cross


def unrolled(question: Question) -> Tensor:
    """Return the derivative of f after the inner steps, by differentiating the loop as it stands."""
    x = question.x.double().clone().requires_grad_()
    y = flat(question.start).double()
    first, second = torch.zeros_like(y), torch.zeros_like(y)
    for t in range(1, question.steps + 1):
        at = y if y.requires_grad else y.clone().requires_grad_()
        (slope,) = torch.autograd.grad(_inner(question)(at, x), at, create_graph=True)
        if question.optimizer == "adam":
            first = BETA_1 * first + (1 - BETA_1) * slope
            second = BETA_2 * second + (1 - BETA_2) * slope**2
            change = first / (1 - BETA_1**t) / ((second / (1 - BETA_2**t)).sqrt() + EPSILON)
        else:
            first = change = MOMENTUM * first + slope if question.optimizer == "momentum" else slope
        y = at - question.rate * change
    return torch.autograd.grad(_outer(question)(x, y), x)[0]


def spectrum(inner: Callable[[Params, Tensor], Tensor], y: Params, x: Tensor) -> tuple[float, float]:
    """Return the least and the largest eigenvalue of H."""

    def cost(at: Tensor) -> Tensor:
        return inner(like(at, y), x)

    hessian = torch.func.jacrev(torch.func.grad(cost))(flat(y))
    values = torch.linalg.eigvalsh(hessian)
    return float(values[0]), float(values[-1])


def polish(inner: Callable[[Params, Tensor], Tensor], start: Params, x: Tensor, newton: int = 6) -> Params:
    """Return a local minimizer: L-BFGS, then Newton's steps to rounding.

    Args:
        inner: g(y, x).
        start: where to begin, float64.
        x: the upper parameters.
        newton: how many steps of Newton.

    Returns:
        The minimizer.
    """
    at = flat(start).clone().requires_grad_()
    solver = torch.optim.LBFGS([at], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = inner(like(at, start), x)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]
    y = at.detach()
    slope = torch.func.grad(lambda p: inner(like(p, start), x))
    for _ in range(newton):
        y = y - torch.linalg.solve(torch.func.jacrev(slope)(y), slope(y))
    return like(y, start)


def _inner(question: Question) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, x: question.inner(like(y, question.start), x)


def _outer(question: Question) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: question.outer(x, like(y, question.start))
