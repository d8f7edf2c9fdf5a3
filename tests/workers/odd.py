"""Run by torchrun: losses, metrics and calls that differ between processes."""

from __future__ import annotations

import os
import signal
import warnings

import torch
import torchopt

import funcmlo as fm
from tests.workers.data_parallel import error
from tests.workers.tell import tell

X = torch.arange(14, dtype=torch.float64).reshape(7, 2) / 7


def levels(loss: object, **how: object) -> tuple[fm.Level, fm.Level]:
    """A level with a given loss, and one that looks at it."""
    lower = fm.Level("w", loss, torchopt.sgd(0.1), steps=2, response=fm.AID(fm.CG(4, tol=1e-14)), **how)
    return lower, fm.Level("h", lambda h, w, batch: ((batch @ w) ** 2).mean() + (h**2).sum(), torchopt.sgd(0.1))


def step(parallel: str | None, loss: object, batch: object) -> tuple[fm.State, dict]:
    """One step."""
    program = fm.Multilevel(*levels(loss), parallel=parallel)
    one = torch.ones(2, dtype=torch.float64)
    return program.step(program.init({"w": one, "h": one}), {"w": batch, "h": batch})


def metrics(mine: fm.Processes) -> None:
    """Numbers are averaged over examples; what is told for each example stays the process's own."""

    def loss(w: torch.Tensor, h: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        each = batch @ w - 1
        told = {"mean": each.detach().mean(), "float": float(each.detach().mean()), "each": each.detach(), "flags": each > 0}
        return (each**2).mean() + (h * w).pow(2).sum(), told

    (_, alone), (_, shared) = step(None, loss, X), step("data", loss, mine.share(X))
    a, b = alone["w"]["aux"], shared["w"]["aux"]
    apart = max(abs(float(a["mean"] - b["mean"])), abs(a["float"] - b["float"]))
    own = error(mine.share(a["each"]), b["each"]) if mine.rank == 0 else 0.0
    tell(mine, "metrics", {"apart": apart, "own": own, "length": len(b["each"])})

    def some(w: torch.Tensor, h: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return ((batch @ w) ** 2).mean() + (h * w).pow(2).sum(), {"a": batch.mean()} if mine.rank else {}

    try:
        step("data", some, mine.share(X))
        tell(mine, "different metrics", {"refused": ""})
    except fm.LossError as refused:
        tell(mine, "different metrics", {"refused": str(refused)})


def tasks(mine: fm.Processes) -> None:
    """Metrics of tasks are those of all, as in one process."""

    def adapt(own: torch.Tensor, meta: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return ((own - batch) ** 2).mean() + ((own - meta) ** 2).sum(), {"gap": (own - batch).detach().abs().mean()}

    def query(meta: torch.Tensor, own: torch.Tensor, batch: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return ((own - batch) ** 2).mean(), {"vector": (own - batch).detach(), "count": torch.tensor(3)}

    found = []
    for parallel in (None, "tasks"):
        program = fm.Multilevel(
            fm.Level("own", adapt, torchopt.sgd(0.1), steps=2, tasks=7, response=fm.ITD()),
            fm.Level("meta", query, torchopt.sgd(0.1)),
            parallel=parallel,
        )
        state = program.init({"own": torch.zeros(7, 2, dtype=torch.float64), "meta": torch.ones(2, dtype=torch.float64)})
        found.append(program.step(state, {"own": X, "meta": X})[1])
    alone, shared = ({name: told[name]["aux"] for name in ("own", "meta")} for told in found)
    alike = torch.equal(alone["meta"]["count"], shared["meta"]["count"])
    distance = max(
        error(shared["own"]["gap"], alone["own"]["gap"]), error(shared["meta"]["vector"], alone["meta"]["vector"])
    )
    tell(mine, "metrics of tasks", {"distance": distance, "alike counts": alike}, bits=shared)


def untouched(mine: fm.Processes) -> None:
    """One process's examples touch no parameter of a level; the others' do."""

    def masked(w: torch.Tensor, h: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        valid = batch[:, 0] > 8 / 7
        if not valid.any():
            return torch.zeros((), dtype=torch.float64)
        return ((batch[valid] @ w - 1) ** 2).sum() / len(batch) + (h * w).pow(2).sum() * valid.double().mean()

    def joined(w: torch.Tensor, h: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return masked(w, h, batch)

    (alone, told), (shared, shared_told) = step(None, joined, X), step("data", joined, mine.share(X))
    figures = {name: error(shared.params[name], alone.params[name]) for name in ("w", "h")}
    apart = abs(float(told["h"]["gradient_norm"] - shared_told["h"]["gradient_norm"]))
    tell(mine, "untouched", {**figures, "norm": apart}, bits=shared.params)


def parts(mine: fm.Processes) -> None:
    """Processes may have different numbers of microbatches, and batches whose sizes are beyond half precision."""

    def loss(w: torch.Tensor, h: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return ((batch @ w - 1) ** 2).mean() + (h * w).pow(2).sum()

    own = mine.share(X)
    batch = fm.Microbatches(own.split(2)) if mine.rank else fm.Microbatches([own])
    (alone, _), (shared, _) = step(None, loss, X), step("data", loss, batch)
    tell(mine, "microbatches", {"w": error(shared.params["w"], alone.params["w"])}, bits=shared.params)
    half = fm.Multilevel(fm.Level("y", lambda y, batch: (y * batch).mean() * 4, torchopt.sgd(0.1)), parallel="data")
    state = half.init({"y": torch.ones((), dtype=torch.float16)})
    _, told = half.step(state, {"y": torch.ones(30000, dtype=torch.float16)})
    tell(mine, "half precision", {"cost": float(told["y"]["cost"])})


def calls(mine: fm.Processes) -> None:
    """A program that shares nothing runs in one process alone; Ctrl-C in one stops all after the same step."""
    alone = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), torchopt.sgd(0.1)))
    first = alone.init({"y": torch.ones(())})
    steps = len(alone.run(first, {}, steps=3, validate=lambda s: 1.0, progress=False)[1]) if mine.first else 3
    tell(mine, "alone", {"steps": steps})
    shared = fm.Multilevel(fm.Level("y", lambda y, batch: (y * batch).mean(), torchopt.sgd(0.1)), parallel="data")

    def stop(state: fm.State) -> float:
        if mine.rank == 1 and state.step["y"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    state, history = shared.run(first, {"y": torch.ones(2)}, steps=50, validate=stop, progress=False)
    tell(mine, "interrupted", {"steps": len(history), "stopped": history.attrs["stopped"]}, bits=state.params)


def main() -> None:
    """All of them."""
    with fm.processes(timeout=60) as mine:
        for part in (metrics, tasks, untouched, parts, calls):
            part(mine)
        left = fm.Multilevel(fm.Level("y", lambda y, batch: (y * batch).mean(), torchopt.sgd(0.1)), parallel="data")
        state = left.init({"y": torch.ones(())})
        try:
            fm.Processes(0, 2, mine.device).share(torch.ones(1))
        except fm.BatchError as refused:
            tell(mine, "too few", {"refused": str(refused)})
    try:
        left.step(state, {"y": torch.ones(2)})
    except fm.ProcessError as refused:
        if mine.first:
            tell(fm.Processes(0, 1, mine.device), "left", {"refused": str(refused)})


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
