"""A program's calls as they are written: an outer step, a hypergradient, a cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmlo import finite, precision
from funcmlo.errors import NonFiniteError
from funcmlo.fold import Folded
from funcmlo.loops import Walk
from funcmlo.metrics import metrics_of
from funcmlo.nested import Nest
from funcmlo.plan import Plan
from funcmlo.purity import unchanged
from funcmlo.schedule import Loop
from funcmlo.state import State


def step(plan: Plan, state: State, batches: Mapping[str, Any]) -> tuple[State, dict[str, dict[str, Any]], dict[str, float]]:
    """Make one outer step; see `Multilevel.step`.

    Args:
        plan: the program's plan.
        state: where it stands.
        batches: by level name.

    Returns:
        The new state, metrics by level, and how long each level took.
    """
    work = plan.begin(plan.graph.levels, state, batches, pure=False)
    with unchanged(state, batches), torch.no_grad(), precision.apart(), plan.whole():
        for loop in plan.schedule.tops:
            work.run(loop)
        if isinstance(work, Walk):
            work.finish()
    finite.check(work.events, work.levels, work.roles.apart)
    metrics = {name: metrics for name in plan.graph.levels if (metrics := metrics_of(name, work))}
    return work.state, metrics, work.clock.seconds


def hypergradient(
    plan: Plan, state: State, batches: Mapping[str, Any], of: str, solve: bool, *, wanted: bool = False
) -> Folded:
    """Return a hypergradient; see `Multilevel.hypergradient`.

    Args:
        plan: the program's plan.
        state: where it stands.
        batches: by level name.
        of: the level.
        solve: whether the lower levels make their inner steps first.
        wanted: whether the costs of all inner steps are computed, of which an error can then tell.

    Returns:
        The hypergradient and what came with it.

    Raises:
        NonFiniteError: something is no longer finite.
    """
    before, own, running = plan.ahead(of, solve)
    solved = [name for name in plan.graph.levels if of in plan.users[name]]
    work = plan.begin(running | {*solved}, state, batches, pure=True, solve=solve)
    if isinstance(work, Walk):
        work.wanted = wanted
    with unchanged(state, batches), torch.no_grad(), precision.apart(), plan.whole():
        _advance(work, before)
        if isinstance(work, Nest):
            folded = work.hypergradient(of, begin=solve and own.steps > 0)
        else:
            folded = work.hypergradient(of, own if solve else None, solved)
    try:
        finite.check(work.events, work.levels, work.roles.apart)
    except NonFiniteError:
        if wanted or isinstance(work, Nest):
            raise
        return hypergradient(plan, state, batches, of, solve, wanted=True)
    return folded


def cost(plan: Plan, state: State, batches: Mapping[str, Any], of: str, solve: bool) -> Tensor:
    """Return a level's cost, with its sign; see `Multilevel.cost`.

    Args:
        plan: the program's plan.
        state: where it stands.
        batches: by level name.
        of: the level.
        solve: whether the lower levels make their inner steps first.

    Returns:
        The cost.
    """
    before, own, running = plan.ahead(of, solve)
    work = plan.begin(running, state, batches, pure=True, solve=solve)
    if isinstance(work, Walk):  # nothing is kept of the loops for a derivative that is not taken
        work.users = {name: [user for user in users if user != of] for name, users in work.users.items()}
    with unchanged(state, batches), torch.no_grad(), precision.apart(), plan.whole():
        _advance(work, before)
        if isinstance(work, Nest):
            value = work.cost(of, begin=solve and own.steps > 0)
        else:
            value = work.cost(of, own if solve else None)
    finite.check(work.events, work.levels, work.roles.apart)
    return -value if {level.name: level for level in plan.levels}[of].maximize else value


def _advance(work: Walk | Nest, before: Sequence[Loop | str]) -> None:
    for item in before:
        work.begin(item) if isinstance(item, str) else work.run(item)
