"""What a question is: a bilevel problem with an independent answer, in plain torch, that every library can be given.

Notation: lower cost g(y, x), solution y*(x), upper cost f(x, y), H = ∇²_yy g, and dF/dx = ∇_x f − ∇²_xy g H⁻¹ ∇_y f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Params = dict[str, Tensor]

Target = Literal["implicit", "unrolled", "identity", "one step"]
"""What a method says that it computes: dF/dx by the implicit formula; the derivative of the inner steps; the implicit
formula with H⁻¹ replaced by the identity; the derivative of one step of gradient descent at the solution."""

CONVERGED: frozenset[Target] = frozenset({"implicit", "unrolled", "identity", "one step"})


@dataclass(frozen=True, eq=False)
class Question:
    """A bilevel problem that is put to the libraries.

    Attributes:
        name: the column's heading.
        seen: what a wrong answer shows.
        inner: g(y, x).
        outer: f(x, y).
        x: the upper parameters, one tensor.
        start: where the inner loop starts; the solution itself unless the question is about the loop.
        solution: y*(x) in float64; None where the answer is the derivative of a few steps.
        rate: the inner loop's learning rate.
        steps: its number of steps.
        curvature: the largest eigenvalue of H, whose inverse is the scale of a Neumann series.
        terms: how many terms of that series (or steps of rate 1/curvature) leave less than 1e-8.
        optimizer: of the inner loop: "sgd", "momentum" (0.9), or "adam".
        targets: which kinds of methods it is put to.
        rate_converges: whether `steps` steps of `rate` contract; if not, methods that rely on it are not asked.
        defined: whether there is an answer; if not, anything finite is wrong.
        tolerance: the relative error that a method without discretization may have.
    """

    name: str
    seen: str
    inner: Callable[[Params, Tensor], Tensor]
    outer: Callable[[Tensor, Params], Tensor]
    x: Tensor
    start: Params
    solution: Params | None
    rate: float
    steps: int
    curvature: float
    terms: int
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    targets: frozenset[Target] = CONVERGED
    rate_converges: bool = True
    defined: bool = True
    tolerance: float = 1e-6

    @property
    def size(self) -> int:
        """The number of lower parameters."""
        return sum(p.numel() for p in self.start.values())


def torch_optimizer(question: Question, params: Any) -> torch.optim.Optimizer:
    """Return the inner loop's optimizer as torch has it."""
    if question.optimizer == "adam":
        return torch.optim.Adam(params, lr=question.rate)
    return torch.optim.SGD(params, lr=question.rate, momentum=0.9 if question.optimizer == "momentum" else 0.0)


def detached(tensors: Params) -> Params:
    """Return copies that are leaves and require a gradient."""
    return {name: p.detach().clone().requires_grad_() for name, p in tensors.items()}
