"""By hand: plain torch.autograd, the graph of the inner gradient kept for all products, a conjugate gradient from zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings


def momentum(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the method whose inner loop is gradient descent with momentum, written out."""
    y = {name: p.requires_grad_() for name, p in problem.classifier().items()}
    leaves = list(y.values())
    speed = [torch.zeros_like(p) for p in leaves]

    def answer(x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            slopes = torch.autograd.grad(problem.lower(y, x), leaves)
            with torch.no_grad():
                for p, v, slope in zip(leaves, speed, slopes, strict=True):
                    v.mul_(settings.momentum).add_(slope)
                    p.sub_(v, alpha=settings.lower_lr)
        return implicit(problem, y, x, int(knobs.linear))

    return answer


def lbfgs(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the method whose inner loop is torch's L-BFGS, begun anew at each outer step."""
    y = {name: p.requires_grad_() for name, p in problem.classifier().items()}
    leaves = list(y.values())

    def answer(x: Tensor, steps: int) -> Tensor:
        solver = torch.optim.LBFGS(
            leaves, max_iter=steps, history_size=settings.memory, tolerance_grad=0, tolerance_change=0
        )

        def closure() -> Tensor:
            solver.zero_grad()
            cost = problem.lower(y, x)
            cost.backward(inputs=leaves)  # type: ignore[no-untyped-call]
            return cost

        solver.step(closure)  # type: ignore[no-untyped-call]
        return implicit(problem, y, x, int(knobs.linear))

    return answer


def implicit(problem: Cleaning, y: dict[str, Tensor], x: Tensor, products: int) -> Tensor:
    """Return −∇²_xy g · w, w after this many products of the conjugate gradient on Hw = ∇_y f."""
    x, leaves = x.clone().requires_grad_(), list(y.values())
    slopes = torch.autograd.grad(problem.lower(y, x), leaves, create_graph=True)
    r = list(torch.autograd.grad(problem.upper(x, y), leaves))
    w, p, left = [torch.zeros_like(part) for part in r], r, _dot(r, r)
    for _ in range(products):
        hp = torch.autograd.grad(slopes, leaves, p, retain_graph=True)
        length = left / _dot(p, hp)
        w = [a + length * b for a, b in zip(w, p, strict=True)]
        r = [a - length * b for a, b in zip(r, hp, strict=True)]
        before, left = left, _dot(r, r)
        p = [a + left / before * b for a, b in zip(r, p, strict=True)]
    return -torch.autograd.grad(slopes, x, w)[0]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(p * q).sum() for p, q in zip(a, b, strict=True)]).sum()


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {"by-hand": momentum, "by-hand-lbfgs": lbfgs}
