"""An inner loop: the steps of a level with no level below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.batches import forget
from funcmlo.hypergrad.base import Requires
from funcmlo.hypergrad.solved import Keep, Standing, held
from funcmlo.problem import Problem
from funcmlo.replaying.steps import Steps
from funcmlo.signature import BUFFERS


class Found(NamedTuple):
    """What an inner loop leaves besides the parameters where it ends; a tree.

    Attributes:
        opt_state: the optimizer's state there.
        begin: the standing before the first step.
        costs: the cost before each step.
        aux: the last step's metrics.
        seen: the level's buffers, if it has any, before the steps that may be made again, the last one at least.
        after: its buffers after the last step.
        stays: the standings that were kept, by step.
        slope: the norm of the last step's gradient; None without a step, or of an outside solver.
    """

    opt_state: Tree
    begin: Standing
    costs: list[Tensor]
    aux: Any
    seen: list[dict[str, Tree]]
    after: dict[str, Tree]
    stays: dict[int, Standing]
    slope: Tensor | None


def descend(
    problem: Problem,
    standing: Standing,
    inputs: dict[str, Tree],
    steps: int,
    requires: Requires,
    keep: Keep,
    *,
    wanted: bool = True,
    trusting: bool = True,
) -> tuple[Tree, Found]:
    """Make a level's inner steps.

    Args:
        problem: the level, bound.
        standing: where the level stands.
        inputs: the parameters of the levels that it reads.
        steps: the number of updates.
        requires: what is wanted of the loop besides its end.
        keep: which standings are kept.
        wanted: whether anybody asks for all steps' costs; else replayed steps leave theirs out.
        trusting: whether steps may be replayed as another loop recorded them; the last one is held against what is written.

    Returns:
        The parameters where the loop ends, and what else it leaves.
    """
    y, s = problem.start(inputs, *standing) if steps else standing
    begin = y, s
    costs: list[Tensor] = []
    aux: dict[str, Any] = {}
    stays: dict[int, Standing] = {}
    now, seen = problem, list[dict[str, Tree]]()
    slope: Tensor | None = None
    replayed = None
    if requires != "trajectory":
        replayed = Steps.of(problem, (y, s), inputs, steps, costs=wanted, trusting=trusting)
    t = -1
    while (t := t + 1) < steps:
        if t in keep.before:
            stays[t] = held((y, s), keep.on_cpu)
        until = min((stop for stop in keep.before if stop > t), default=steps - 1)
        if replayed is not None and replayed.ready and t < until:
            y, s, some = replayed.through((y, s), t, until)
            costs, t = [*costs[:t], *some], until - 1
            continue
        if problem.level.carries_buffers:
            seen = [*(seen if requires != "solution" else ()), own_buffers(now.fixed)]
        if t < steps - 1 and replayed is not None:
            y, s, cost = replayed.update(now, (y, s), inputs, t)
        elif replayed is not None and (made := replayed.last(now, (y, s), t)) is not None:
            (y, s), cost, gradient, aux = made
            slope = _tree.norm(gradient)
        elif t < steps - 1 or problem.level.has_solver:
            y, s, cost, aux = now.update(y, s, inputs, t)
        else:
            gradient, cost, aux = now.gradient(y, inputs, t)
            slope = _tree.norm(_tree.detach(gradient))
            before = y, s
            y, s = now.apply(y, s, inputs, gradient, t)
            if trusting and replayed is not None and not replayed.agrees(now, before, (y, s), cost, t):
                return descend(problem, standing, inputs, steps, requires, keep, wanted=wanted, trusting=False)
        now, aux = now.after(aux, t)
        if not wanted:
            costs = [cost] if t == steps - 1 else []
        elif requires == "trajectory" or _tracing.transforming() or torch.is_grad_enabled():
            costs.append(cost)
        else:  # side by side: small tensors that stay, one by one, would riddle the heap that the steps work in
            costs += cost.new_empty(steps - len(costs)).unbind()
            costs[t].copy_(cost)
        if requires == "solution" and not problem.level.roll_back:
            forget(problem.feed, problem.first + t)
    return y, Found(s, begin, costs, aux, seen, own_buffers(now.fixed), stays, slope)


def own_buffers(fixed: Mapping[str, Any]) -> dict[str, Tree]:
    """Return a level's own buffers, if it has any, out of what its loss reads as constants."""
    return {BUFFERS: fixed[BUFFERS]} if BUFFERS in fixed else {}
