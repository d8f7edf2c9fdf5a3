"""One small bilevel program that many tests run, with its batches."""

from __future__ import annotations

import torch
import torchopt

import funcmlo as fm
from tests.registry import vector_like

SGD = torchopt.sgd(0.1)


def lower(y, x, batch):
    """½‖y − x‖² + ⟨y, batch⟩, whose Hessian is the identity, with a metric."""
    return ((y - x) ** 2).sum() / 2 + (y * batch).sum(), {"batch": batch.sum()}


def upper(x, y):
    """Σ sin y + 0.1 ‖x‖²."""
    return torch.sin(y).sum() + 0.1 * (x**2).sum()


def program(response: fm.BestResponse | None = None, optimizer: object = None, **fields) -> fm.Multilevel:
    """The program, three inner steps, Adam above."""
    fields.setdefault("steps", 3)
    return fm.Multilevel(
        fm.Level("y", lower, optimizer or SGD, response=response or fm.AID(fm.CG(5)), **fields),
        fm.Level("x", upper, torchopt.adam(0.1)),
    )


class Spy(fm.BestResponse):
    """An estimator that answers with zeros and keeps what it saw."""

    requires = "replay"

    def __init__(self) -> None:
        object.__setattr__(self, "seen", [])

    def vjp(self, solved, cotangent, state):
        self.seen.append(solved)
        return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state, fm.Stats()


def start(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random parameters."""
    return {"y": vector_like(torch.zeros(4).double(), seed), "x": vector_like(torch.zeros(4).double(), seed + 1)}


BATCHES = [vector_like(torch.zeros(4).double(), 10 + i) for i in range(12)]
