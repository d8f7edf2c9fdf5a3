"""A workload's draw in torch: trees of tensors, costs that are functions of them, and what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paper_repro.peers import torch_operations
from paper_repro.peers.draws import Arrays, Drawn
from paper_repro.peers.workloads import Workload

Params = dict[str, Tensor]


class NotOfferedError(Exception):
    """A contender does not have what is asked of it; the message says why."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a contender is asked: one hypergradient of a draw.

    Attributes:
        workload: the workload.
        estimator: which hypergradient: one of `workloads.ESTIMATORS`.
        products: of a linear solver, with the inner Hessian.
        drawn: the draw, for libraries of other arrays.
        dtype: of the tensors.
    """

    workload: Workload
    estimator: str
    products: int
    drawn: Drawn
    dtype: torch.dtype = torch.float32

    @property
    def steps(self) -> int:
        """The inner steps."""
        return self.workload.steps

    @property
    def rate(self) -> float:
        """The inner steps' rate."""
        return self.workload.rate

    def tensors(self, arrays: Arrays) -> Params:
        """Return arrays as tensors of the problem's dtype; integers and truth values stay what they are."""
        found = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in found.items()}


@dataclass(frozen=True, eq=False)
class Costs:
    """The costs of a problem without tasks, as functions in torch with the data bound.

    Attributes:
        workload: the workload.
        data: what they read.
    """

    workload: Workload
    data: Params

    def inner(self, y: Params, x: Params) -> Tensor:
        """Return the inner cost."""
        value: Tensor = self.workload.inner(torch_operations, y, x, self.data)
        return value

    def outer(self, x: Params, y: Params) -> Tensor:
        """Return the outer cost."""
        value: Tensor = self.workload.outer(torch_operations, x, y, self.data)
        return value


@dataclass(frozen=True, eq=False)
class Tasks:
    """The costs of a problem with tasks, as functions in torch.

    Attributes:
        workload: the workload.
        support: what each task learns from.
        query: what each is tested on.
    """

    workload: Workload
    support: list[Params]
    query: list[Params]

    def inner(self, y: Params, task: int) -> Tensor:
        """Return a task's inner cost."""
        value: Tensor = self.workload.inner(torch_operations, y, self.support[task])
        return value

    def outer(self, y: Params, task: int) -> Tensor:
        """Return a task's outer cost."""
        value: Tensor = self.workload.outer(torch_operations, y, self.query[task])
        return value

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self.support)


def costs_of(problem: Problem) -> Costs:
    """Return the costs of a problem without tasks."""
    return Costs(problem.workload, problem.tensors(problem.drawn.data))


def tasks_of(problem: Problem) -> Tasks:
    """Return the costs of a problem with tasks, one by one."""

    def apart(arrays: Arrays) -> list[Params]:
        tensors = problem.tensors(arrays)
        count = len(next(iter(tensors.values())))
        return [{name: x[i].clone() for name, x in tensors.items()} for i in range(count)]

    return Tasks(problem.workload, apart(problem.drawn.data), apart(problem.drawn.query))


def leaves(tensors: Params) -> Params:
    """Return copies that require a gradient."""
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def flat(gradient: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers of a tree of tensors or arrays in the order of its names, in float64."""
    return np.concatenate([np.asarray(gradient[name], dtype=np.float64).reshape(-1) for name in sorted(gradient)])
