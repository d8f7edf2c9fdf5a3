"""boat: `Problem.run_iter` with naive gradient descent below; the problem is set up once."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paper_repro.holder import Holder
from paper_repro.peers.problem import Params, Problem, costs_of, tasks_of

boat = importlib.import_module("boat_torch")

OPERATIONS = {"itd": ["RAD"], "cg": ["CG"], "neumann": ["NS"], "difference": ["FD"]}


def lower_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return g; boat finds this function by its path."""
    value: Tensor = lower(lambda y: feed["inner"](y, upper), **options)
    return value


def upper_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return f; boat finds this function by its path."""
    value: Tensor = lower(lambda y: feed["outer"](upper, y), **options)
    return value


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked.
        variant: none.

    Returns:
        A function without arguments.
    """
    del variant
    below = Holder(problem.tensors(problem.drawn.start))
    if problem.workload.tasks:
        return maml(problem, below)
    costs, above = costs_of(problem), Holder(problem.tensors(problem.drawn.hyper))
    feed = {
        "inner": lambda y, upper: costs.inner(y, upper(lambda x: x)),
        "outer": lambda upper, y: costs.outer(upper(lambda x: x), y),
    }
    solver = built(problem, below, above, OPERATIONS[problem.estimator], tasks=False)
    # FD is one step's derivative, −α ∇²_xy g v where f does not read x; the others have −∇²_xy g v.
    scale = 1 / problem.rate if problem.estimator == "difference" else 1.0

    def call() -> Params:
        for x in above.parameters():
            x.grad = None
        solver.run_iter(feed, feed, current_iter=0)
        return {name: scale * torch.as_tensor(x.grad) for name, x in above.named_parameters()}

    return call


def maml(problem: Problem, below: Holder) -> Callable[[], Params]:
    """Return the function that takes its derivative by the start (IAD), task after task."""
    tasks, above = tasks_of(problem), Holder(problem.tensors(problem.drawn.start))
    feeds = [
        {"inner": lambda y, upper, i=i: tasks.inner(y, i), "outer": lambda upper, y, i=i: tasks.outer(y, i)}
        for i in range(len(tasks))
    ]
    solver = built(problem, below, above, ["IAD"], tasks=True)

    def call() -> Params:
        for x in above.parameters():
            x.grad = None
        solver.run_iter(feeds, feeds, current_iter=0)
        return {name: torch.as_tensor(x.grad) / len(tasks) for name, x in above.named_parameters()}

    return call


def built(problem: Problem, below: Holder, above: Holder, operations: list[str], *, tasks: bool) -> Any:
    """Return boat's problem with its solvers.

    Args:
        problem: what is asked.
        below: the inner parameters.
        above: the hyperparameters, or the start.
        operations: boat's names of how the hypergradient is computed.
        tasks: whether it is handed a list of tasks.

    Returns:
        The problem; its list of losses goes nowhere.
    """
    config: dict[str, Any] = {
        "fo_op": None,
        "gm_op": ["NGD"],
        "na_op": operations,
        "lower_level_model": below,
        "upper_level_model": above,
        "lower_level_var": list(below.parameters()),
        "upper_level_var": list(above.parameters()),
        "lower_level_opt": torch.optim.SGD(below.parameters(), lr=problem.rate),
        "upper_level_opt": torch.optim.SGD(above.parameters(), lr=0.0),
        "lower_iters": problem.steps,
        "device": "cpu",
        "loss_log_path": os.devnull,
        "accumulate_grad": tasks,
        "copy_last_param": False,
        "return_grad": True,
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "RGT": {"truncate_iter": 0},
        "CG": {"tolerance": 0.0, "k": problem.products},  # NS reads its terms here too
        "FD": {"r": 1e-2},
    }
    losses = {f"{level}_level_loss": {"function": f"{__name__}.{level}_loss", "params": {}} for level in ("lower", "upper")}
    solver = boat.Problem(config, losses)
    solver.build_ll_solver()
    solver.build_ul_solver()
    return solver
