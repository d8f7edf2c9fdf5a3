"""Run by torchrun: meta-learning whose tasks processes share, beside one process that has all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torchopt

import funcmlo as fm
from tests.registry import ESTIMATORS
from tests.workers.data_parallel import error
from tests.workers.tell import tell

TASKS = 5
"""Shared unevenly by two processes."""


def tasks(t: int) -> dict[str, torch.Tensor]:
    """All tasks' data at a step."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(TASKS, 6, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randn(TASKS, 6, generator=generator, dtype=torch.float64)}


def program(
    response: fm.BestResponse, parallel: str | None, *, reduce: str = "mean", chunk: int | None = None, init: bool = True
) -> fm.Multilevel:
    """Ridge regression per task around a shared center with learned weights, drawn to the center."""

    def adapt(own: dict, meta: dict, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ own["w"] - batch["y"]
        return (residual**2).mean() / 2 + (meta["decay"].exp() * (own["w"] - meta["w"]) ** 2).sum() / 2

    def query(meta: dict, own: dict, batch: dict) -> torch.Tensor:
        return ((batch["x"] @ own["w"] - batch["y"]) ** 2).mean() + 0.1 * (meta["decay"] ** 2).sum()

    return fm.Multilevel(
        fm.Level(
            "own",
            adapt,
            torchopt.sgd(0.1, momentum=0.5),
            steps=5,
            response=response,
            tasks=TASKS,
            chunk=chunk,
            init=(lambda meta: {"w": meta["w"]}) if init else None,
        ),
        fm.Level("meta", query, torchopt.adam(0.05), reduce=reduce),
        parallel=parallel,
    )


def first(of: fm.Multilevel, init: bool = True) -> fm.State:
    """The first state; every process is given all tasks."""
    meta = {"w": torch.ones(3, dtype=torch.float64), "decay": torch.linspace(-1, 0, 3, dtype=torch.float64)}
    own = {} if init else {"own": fm.per_task({"w": torch.zeros(3, dtype=torch.float64)}, TASKS)}
    return of.init({"meta": meta, **own})


def compared(mine: fm.Processes, name: str, response: fm.BestResponse, how: Mapping[str, object] = {}) -> None:
    """Compare one step and one hypergradient."""
    init = bool(how.get("init", True))
    alone, shared = (program(response, parallel, **how) for parallel in (None, "tasks"))
    whole = {"own": tasks, "meta": lambda t: tasks(50 + t)}
    part = {"own": lambda t: mine.share(tasks(t)), "meta": lambda t: tasks(50 + t)}  # given whole, cut to this process's
    expected = alone.hypergradient(first(alone, init), whole, of="meta")
    came = shared.hypergradient(first(shared, init), part, of="meta")
    one, metrics = alone.step(first(alone, init), whole)
    other, shared_metrics = shared.step(first(shared, init), part)
    mine_of_one = mine.share(one.params["own"])
    tell(
        mine,
        name,
        {
            "hypergradient": error(came, expected),
            "step": max(error(other.params["own"], mine_of_one), error(other.params["meta"], one.params["meta"])),
            "cost": max(abs(float(metrics[k]["cost"] - shared_metrics[k]["cost"])) for k in ("own", "meta")),
        },
        bits=[other.params["meta"], other.optimizer["meta"], came],
    )


def main() -> None:
    """Compare every estimator of the registry that works under a map, and the ways to evaluate tasks."""
    with fm.processes() as mine:
        for name, make in ESTIMATORS.items():
            if make(6.0, 3).claims.vmap:
                compared(mine, name, make(6.0, 3))
        for name in ("itd", "cg warm", "cg nystrom"):
            compared(mine, f"{name}: a loop", ESTIMATORS[name](6.0, 3), {"chunk": 1})
            compared(mine, f"{name}: chunks", ESTIMATORS[name](6.0, 3), {"chunk": 2})
        for name in ("itd recompute", "cg"):
            compared(mine, f"{name}: a sum", ESTIMATORS[name](6.0, 3), {"reduce": "sum"})
            compared(mine, f"{name}: going on", ESTIMATORS[name](6.0, 3), {"init": False})


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
