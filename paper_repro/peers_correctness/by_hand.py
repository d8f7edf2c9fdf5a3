"""Hand-written methods in plain torch: what a user without any library would write, and a check of the questions."""

from __future__ import annotations

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Params, Question, detached, torch_optimizer
from paper_repro.peers_correctness.reference import flat, like


def solution(question: Question) -> Params:
    """Run the inner loop and return where it ends."""
    holder = Holder(question.start)
    optimizer = torch_optimizer(question, holder.parameters())
    for _ in range(question.steps):
        optimizer.zero_grad()
        holder(lambda y: question.inner(y, question.x)).backward()
        optimizer.step()
    return detached(dict(holder.named_parameters()))


def cg(question: Question) -> Tensor:
    """Return the implicit hypergradient by conjugate gradient, with products by double backward."""
    y, x = solution(question), question.x.detach().clone().requires_grad_()
    direct, v = _outer_gradients(question, x, y)
    slope = flat(dict(zip(y, torch.autograd.grad(question.inner(y, x), list(y.values()), create_graph=True), strict=True)))

    def product(p: Tensor) -> Tensor:
        parts = torch.autograd.grad(slope, list(y.values()), p, retain_graph=True)
        return torch.cat([part.reshape(-1) for part in parts])

    w, residual = torch.zeros_like(v), v
    p, left = v, v @ v
    for _ in range(4 * question.size):
        if left <= 1e-30 * (v @ v):
            break
        hp = product(p)
        length = left / (p @ hp)
        w, residual = w + length * p, residual - length * hp
        p, left = residual + (residual @ residual) / left * p, residual @ residual
    return direct - torch.autograd.grad(slope, x, w)[0]


def difference(question: Question) -> Tensor:
    """Return the identity-inverse hypergradient by a central difference of length 1e-5."""
    y, x = solution(question), question.x.detach().clone().requires_grad_()
    direct, v = _outer_gradients(question, x, y)
    at = flat(y).detach()
    size = (1e-5 if at.dtype == torch.float64 else 1e-2) / float(v.norm())

    def slope(shift: float) -> Tensor:
        return torch.autograd.grad(question.inner(like(at + shift * v, question.start), x), x)[0]

    return direct - (slope(size) - slope(-size)) / (2 * size)


def unroll(question: Question) -> Tensor:
    """Return the derivative through gradient descent, its updates written as functions."""
    x = question.x.detach().clone().requires_grad_()
    y = detached(question.start)
    for _ in range(question.steps):
        slopes = torch.autograd.grad(question.inner(y, x), list(y.values()), create_graph=True)
        y = {name: p - question.rate * slope for (name, p), slope in zip(y.items(), slopes, strict=True)}
    return torch.autograd.grad(question.outer(x, y), x)[0]


def _outer_gradients(question: Question, x: Tensor, y: Params) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(question.outer(x, y), [x, *y.values()], allow_unused=True)
    direct = torch.zeros_like(x) if found[0] is None else found[0]
    return direct, torch.cat([part.reshape(-1) for part in found[1:]])


METHODS = (
    Method("unroll", "unrolled", unroll, uses_rate=True, optimizers=frozenset({"sgd"})),
    Method("cg", "implicit", cg),
    Method("difference", "identity", difference, difference=True),
)
