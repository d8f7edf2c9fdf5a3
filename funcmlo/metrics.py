"""What `step` tells about a level."""

from __future__ import annotations

from typing import Any

import torch

from funcmlo.loops import Walk
from funcmlo.nested import Nest


def metrics_of(name: str, work: Walk | Nest) -> dict[str, Any]:
    """Return a level's metrics after a step.

    Args:
        name: the level.
        work: the step's work, done.

    Returns:
        Metrics by name; empty where the level made no update. Those that the loss returned are of all processes together:
        means of numbers, and of tasks all of them; other tensors are this process's.
    """
    outcome = work.outcomes.get(name)
    if outcome is None or not outcome.costs:
        return {}
    costs, aux, slope = torch.stack(list(outcome.costs)), outcome.aux, outcome.slope
    sharing, tasks = work.roles.sharing.get(name), work.roles.tasks.get(name)
    if sharing is not None and tasks is not None:
        aux = sharing.gathered(aux, f"level '{name}'")
        if tasks.own:
            costs, slope = sharing.averaged(costs, tasks.n), None  # each process has the gradients of its own tasks
    elif sharing is not None and sharing.parts:
        aux = sharing.mean_metrics(aux, outcome.extent, f"level '{name}'")
    sign = -1 if work.levels[name].maximize else 1
    metrics: dict[str, Any] = {"cost": sign * costs[-1], "costs": sign * costs, "aux": aux}
    if slope is not None:
        metrics["gradient_norm"] = slope
    if outcome.folded is not None:
        metrics["stats"] = outcome.folded.plain_stats()
    return metrics
