"""This library: each estimator as a program of two levels, eager, in ITD's memory modes, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torchopt
from torch import Tensor

import funcmlo as fm
from paper_repro.peers import torch_operations
from paper_repro.peers.problem import NotOfferedError, Params, Problem

MEMORY: dict[str, fm.ITD] = {
    "recompute": fm.ITD(memory="recompute"),
    "mixed": fm.ITD(memory="mixed"),
    "checkpoint": fm.ITD(memory=fm.Checkpoint()),
}


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked.
        variant: "" for the defaults, one of ITD's memory modes, "compiled" for a compiled step, "whole" for compiled loops.

    Returns:
        A function without arguments.

    Raises:
        NotOfferedError: the variant is for another estimator or workload, or this version has it not.
    """
    if variant in MEMORY and (problem.estimator != "itd" or problem.workload.tasks):
        raise NotOfferedError("ITD's memory modes are measured without tasks")
    if variant == "whole" and problem.workload.name not in {"logistic", "maml-mlp"}:
        raise NotOfferedError("whole loops are compiled for small problems alone: compiling grows with them")
    program = tasks(problem) if problem.workload.tasks else levels(problem, MEMORY.get(variant))
    if variant in {"compiled", "whole"}:
        if not hasattr(program, "compile"):
            raise NotOfferedError("this version's programs have no compile()")
        program = program.compile(unroll="whole" if variant == "whole" else "step")
    start, hyper = problem.tensors(problem.drawn.start), problem.tensors(problem.drawn.hyper)
    if problem.workload.tasks:
        state, top = program.init({"x": start}), problem.tensors(problem.drawn.query)
    else:
        state, top = program.init({"y": start, "x": hyper}), problem.tensors(problem.drawn.data)
    batches = {"y": problem.tensors(problem.drawn.data), "x": top}

    def call() -> Params:
        found: Params = program.hypergradient(state, batches, of="x")
        return found

    return call


def levels(problem: Problem, memory: fm.ITD | None) -> fm.Multilevel:
    """Return the program without tasks."""

    def inner(y: Params, x: Params, batch: Params) -> Tensor:
        value: Tensor = problem.workload.inner(torch_operations, y, x, batch)
        return value

    def outer(x: Params, y: Params, batch: Params) -> Tensor:
        value: Tensor = problem.workload.outer(torch_operations, x, y, batch)
        return value

    response: fm.BestResponse = {
        "itd": memory or fm.ITD(),
        "cg": fm.AID(fm.CG(problem.products, tol=0.0)),
        "neumann": fm.AID(fm.Neumann(problem.products, scale=problem.rate)),
        "difference": fm.FiniteDifference(),
    }[problem.estimator]
    return fm.Multilevel(
        fm.Level("y", inner, torchopt.sgd(problem.rate), steps=problem.steps, response=response),
        fm.Level("x", outer, torchopt.sgd(1.0)),
    )


def tasks(problem: Problem) -> fm.Multilevel:
    """Return the program with a level of tasks."""

    def inner(y: Params, batch: Params) -> Tensor:
        value: Tensor = problem.workload.inner(torch_operations, y, batch)
        return value

    def outer(x: Params, y: Params, batch: Params) -> Tensor:
        value: Tensor = problem.workload.outer(torch_operations, y, batch)
        return value

    count = len(next(iter(problem.drawn.data.values())))
    below = fm.Level(
        "y",
        inner,
        torchopt.sgd(problem.rate),
        steps=problem.steps,
        init=lambda x: x,
        tasks=count,
        chunk=None if problem.workload.together else 1,
        response=fm.ITD(),
    )
    return fm.Multilevel(below, fm.Level("x", outer, torchopt.sgd(1.0)))
