"""higher: `innerloop_ctx` and its differentiable optimizers."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Question, torch_optimizer

higher = importlib.import_module("higher")


def unrolled(question: Question) -> Tensor:
    """Return the derivative through the patched optimizer's steps."""
    module, x = Holder(question.start), question.x.detach().clone().requires_grad_()
    with higher.innerloop_ctx(module, torch_optimizer(question, module.parameters())) as (patched, optimizer):
        for _ in range(question.steps):
            optimizer.step(patched(lambda y: question.inner(y, x)))
        return torch.autograd.grad(patched(lambda y: question.outer(x, y)), x)[0]


METHODS = (Method("innerloop_ctx", "unrolled", unrolled, uses_rate=True),)
