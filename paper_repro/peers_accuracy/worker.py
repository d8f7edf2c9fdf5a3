"""A process of its own: `python -m paper_repro.peers_accuracy.worker` reads what to do from stdin, and prints JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import CONTENDERS, LINEAR, STEPS, Contender, Knobs
from paper_repro.peers_accuracy.course import Course, Settings


@dataclass(frozen=True)
class Measured:
    """One run along the course.

    Attributes:
        seconds: wall seconds of each outer step.
        processor: processor seconds of each.
        errors: the relative error of each hypergradient.
        stopped: why the run did not reach the end; None if it did.
    """

    seconds: list[float]
    processor: list[float]
    errors: list[float]
    stopped: str | None = None


def measure(
    contender: Contender, problem: Cleaning, course: Course, settings: Settings, knobs: Knobs, *, strict: bool
) -> Measured:
    """Ask a contender at every outer step.

    Args:
        contender: who.
        problem: the data and costs.
        course: the weights and the true hypergradients.
        settings: the rules.
        knobs: the contender's.
        strict: whether to stop at the first error that is too large.

    Returns:
        Its times and errors; the errors are looked at while the clock stands.
    """
    answer = contender.start(problem, settings, knobs)
    seconds, processor, errors = list[float](), list[float](), list[float]()
    for step, weights in enumerate(course.weights.float()):
        begun = time.perf_counter(), time.process_time()
        found = answer(weights, knobs.steps * (settings.begin if step == 0 else 1))
        seconds.append(time.perf_counter() - begun[0])
        processor.append(time.process_time() - begun[1])
        errors.append(course.error(step, found))
        if strict and step >= settings.free and not errors[-1] <= settings.tolerance:
            return Measured(seconds, processor, errors, f"error {errors[-1]:.1e} at outer step {step}")
        if sum(seconds) > settings.limit:
            return Measured(
                seconds, processor, errors, f"over {settings.limit:g} s at outer step {step} of {settings.outer}"
            )
    return Measured(seconds, processor, errors)


def tune(contender: Contender, problem: Cleaning, course: Course, settings: Settings) -> tuple[Knobs | None, str | None]:
    """Find the cheapest knobs of the grid with which every hypergradient is within the tolerance.

    The least number of inner steps is found with the finest solve; for it and the next two the coarsest solve is looked for
    that will do, and of these the fastest pair is taken.

    Args:
        contender: who.
        problem: the data and costs.
        course: the weights and the true hypergradients.
        settings: the rules.

    Returns:
        The knobs; or None, and what became of the finest try.
    """

    def tried(steps: int, linear: float) -> Measured:
        return measure(contender, problem, course, settings, Knobs(steps, linear), strict=True)

    values = LINEAR[contender.linear]
    why: str | None = None
    enough: list[int] = []
    for i, steps in enumerate(STEPS):
        why = tried(steps, values[-1]).stopped
        if why is None:
            enough = list(STEPS[i : i + 3] if len(values) > 1 else STEPS[i : i + 1])
        if why is None or why.startswith("over"):
            break
    found: list[tuple[float, Knobs]] = []
    for more in enough:
        for linear in values:
            run = tried(more, linear)
            if run.stopped is None:
                found.append((sum(run.processor), Knobs(more, linear)))
                break
    return min(found, key=lambda pair: pair[0])[1] if found else None, why


def work(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task.

    Args:
        task: `contender`, `settings`, `seed`, `course` (a path) and, to measure instead of tuning, `knobs`.

    Returns:
        What was found, as plain data.
    """
    settings, contender = Settings(**task["settings"]), CONTENDERS[task["contender"]]
    problem, course = settings.problem(task["seed"]), Course.load(Path(task["course"]))
    if task.get("knobs"):
        return asdict(measure(contender, problem, course, settings, Knobs(**task["knobs"]), strict=False))
    knobs, why = tune(contender, problem, course, settings)
    return {"knobs": asdict(knobs) if knobs else None, "why": why}


def main() -> None:
    """Read a task, do it, print what was found."""
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = work(json.loads(sys.stdin.read()))
        except Exception as problem:
            found = {"failed": f"{type(problem).__name__}: {problem}".splitlines()[0]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
