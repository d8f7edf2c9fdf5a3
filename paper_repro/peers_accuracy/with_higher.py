"""higher: the inner loop in an `innerloop_ctx`, and its derivative."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings

higher = importlib.import_module("higher")


def unrolled(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the derivative through the patched optimizer's steps."""
    del knobs
    module = Holder(problem.classifier())
    optimizer = torch.optim.SGD(module.parameters(), lr=settings.lower_lr, momentum=settings.momentum)

    def answer(x: Tensor, steps: int) -> Tensor:
        x = x.clone().requires_grad_()
        with higher.innerloop_ctx(module, optimizer) as (patched, inner):
            for _ in range(steps):
                inner.step(patched(lambda y: problem.lower(y, x)))
            found = torch.autograd.grad(patched(lambda y: problem.upper(x, y)), x)[0]
            with torch.no_grad():
                for own, moved in zip(module.parameters(), patched.parameters(), strict=True):
                    own.copy_(moved)
        return found

    return answer


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {"higher-itd": unrolled}
