"""One hypergradient of one workload: all contenders alive at once, asked in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paper_repro.peers.child import Job
from paper_repro.peers.contenders import CONTENDERS
from paper_repro.peers.problem import Problem
from paper_repro.peers.served import DiedError, Process, processes
from paper_repro.peers.settings import LEAST, Settings
from paper_repro.peers.units import model
from paper_repro.peers.workloads import WORKLOADS

Outcome = dict[str, Any]
"""Of one contender: `skipped` (why), or `first` (seconds of the first call), `walls`, `processors` (seconds of a call, by
round), `error` (relative, against float64) and `peak` (bytes)."""


def cell(*, settings: Settings, method: str, seed: int) -> dict[str, Any] | None:
    """Measure one hypergradient of one workload.

    Args:
        settings: who is asked, and how often.
        method: the workload and the estimator, such as "mlp cg".
        seed: of the draw.

    Returns:
        `workload`, `estimator`, `outcomes` by contender, `model` (the cost model's seconds) and `units` (its units'); None
        if these settings leave the estimator out.
    """
    name, estimator = method.split()
    if estimator not in settings.estimators:
        return None
    workload = WORKLOADS[name]
    asked = {who: CONTENDERS[who].refusal(workload, estimator) for who in ("by-hand", *settings.contenders)}
    outcomes: dict[str, Outcome] = {who: {"skipped": why} for who, why in asked.items() if why is not None}
    jobs = [job(settings, name, estimator, seed, who) for who, why in asked.items() if why is None]
    with processes(jobs) as alive:  # they import beside the one that makes the reference
        with processes([job(settings, name, estimator, seed, "reference")]) as (one,):
            reference = np.array(one.hear()["gradient"])
        units = measured(alive, outcomes, reference, settings)
    if settings.memory:
        still = [job for job in jobs if "skipped" not in outcomes[job.contender]]
        with processes(still, quiet=True) as alive:
            for process in alive:
                outcomes[process.job.contender]["peak"] = peak(process)
    problem = Problem(workload, estimator, settings.products, workload.drawn(settings.sizes, seed))
    return {
        "workload": name,
        "estimator": estimator,
        "outcomes": {who: outcomes[who] for who in asked},
        "units": units,
        "model": model(problem, units),
    }


def job(settings: Settings, workload: str, estimator: str, seed: int, contender: str) -> Job:
    """Return what a contender's process is for."""
    return Job(workload, settings.sizes, seed, estimator, settings.products, contender, settings.threads)


def measured(
    alive: Sequence[Process], outcomes: dict[str, Outcome], reference: np.ndarray, settings: Settings
) -> dict[str, float]:
    """Warm the processes up, one after the other, and let them take turns.

    Args:
        alive: the processes; by hand first.
        outcomes: takes what comes out.
        reference: the hypergradient in float64.
        settings: how many turns each takes.

    Returns:
        The median seconds of each unit of the cost model, which the first process measures in each round.
    """
    ready: dict[str, tuple[Process, int]] = {}
    for process in alive:  # all of them import before the first is warmed up
        outcomes[process.job.contender] = heard(process)
    for process in alive:
        who = process.job.contender
        if "skipped" in outcomes[who]:
            continue
        warm = heard(process, "warm")
        if "skipped" not in warm:
            ready[who] = process, warm["calls"]
            warm = {"first": warm["first"], "error": apart(warm["gradient"], reference), "walls": [], "processors": []}
        outcomes[who] = warm
    units: list[Mapping[str, float]] = []
    begin = time.perf_counter()
    for i in range(settings.rounds):
        if i >= LEAST and time.perf_counter() - begin > settings.seconds:
            break
        order = list(ready)
        for who in order[i % len(order) :] + order[: i % len(order)]:  # nobody always follows the same one
            process, calls = ready[who]
            turn = process.ask(f"turn {calls}")
            outcomes[who]["walls"].append(turn["wall"])
            outcomes[who]["processors"].append(turn["processor"])
        units.append(ready["by-hand"][0].ask("units"))
    return {name: statistics.median(unit[name] for unit in units) for name in units[0]}


def heard(process: Process, command: str | None = None) -> Outcome:
    """Return what a process says, and why it is skipped if it fails."""
    try:
        said = process.ask(command) if command else process.hear()
    except DiedError as error:
        return {"skipped": str(error)}
    if "failed" in said:
        return {"skipped": said["failed"]}
    return {name: value for name, value in said.items() if value is not None}


def peak(process: Process) -> int | None:
    """Return the bytes that a warm process takes for one hypergradient; None if it failed."""
    if "skipped" in heard(process) or "skipped" in heard(process, "warm"):
        return None
    found: int | None = heard(process, "peak").get("peak")
    return found


def apart(given: Sequence[float], reference: np.ndarray) -> float | None:
    """Return ‖given − reference‖ / ‖reference‖; None if it is not finite, which JSON does not know."""
    error = float(np.linalg.norm(np.array(given) - reference) / np.linalg.norm(reference))
    return error if np.isfinite(error) else None
