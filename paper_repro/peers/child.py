"""One contender in a process of its own: `python -m paper_repro.peers.child JSON`, served over pipes.

It answers each line that it reads with a line of JSON. What libraries print goes to the standard error.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

TURN = 0.05
"""The least seconds that a turn should take."""
WARM = 0.3
"""The least seconds of warm-up after the first call."""


@dataclass(frozen=True)
class Job:
    """What a process is for.

    Attributes:
        workload: its name.
        size: "cpu" or "smoke".
        seed: of the draw.
        estimator: which hypergradient.
        products: of a linear solver.
        contender: its name; "reference" for float64 by hand.
        threads: how many cores the process may use.
    """

    workload: str
    size: str
    seed: int
    estimator: str
    products: int
    contender: str
    threads: int

    def written(self) -> str:
        """Return the job as the process takes it."""
        return json.dumps(asdict(self))


def main() -> None:
    """Do what the lines say, until they end."""
    job, out = Job(**json.loads(sys.argv[1])), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # XLA has as many threads as there are cores to run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    warnings.simplefilter("ignore")
    if job.contender == "reference":
        return answer(out, {"gradient": _reference(job)})
    try:
        server = Server(job)
    except Exception as error:
        return answer(out, {"skipped": f"{type(error).__name__}: {error}".splitlines()[0]})
    answer(out, {"skipped": server.refusal})
    for line in sys.stdin:
        command, *numbers = line.split()
        answer(out, server.answer(command, *map(int, numbers)))


def answer(out: TextIO, content: Mapping[str, Any]) -> None:
    """Write a line."""
    print(json.dumps(content), file=out, flush=True)


class Server:
    """A contender that is set up."""

    def __init__(self, job: Job) -> None:
        import torch

        from paper_repro.peers.contenders import CONTENDERS
        from paper_repro.peers.problem import NotOfferedError, Problem
        from paper_repro.peers.workloads import WORKLOADS

        torch.set_num_threads(job.threads)
        contender, workload = CONTENDERS[job.contender], WORKLOADS[job.workload]
        self.problem = Problem(workload, job.estimator, job.products, workload.drawn(job.size, job.seed))
        self.refusal: str | None = None
        self._measured: dict[str, Callable[[], object]] = {}
        try:
            adapter = importlib.import_module(f"paper_repro.peers.{contender.adapter}")
            self.call: Callable[[], Mapping[str, Any]] = adapter.prepare(self.problem, contender.variant)
        except NotOfferedError as error:
            self.refusal = str(error)

    def answer(self, command: str, *numbers: int) -> Mapping[str, Any]:
        """Do what a line says."""
        known: dict[str, Callable[..., Any]] = {
            "warm": self.warm,
            "turn": self.turn,
            "units": self.units,
            "peak": self.peak,
        }
        found: Mapping[str, Any] = known[command](*numbers)
        return found

    def warm(self) -> dict[str, Any]:
        """Make the first call, and others until it is warm; a call that raises is told."""
        from paper_repro.peers.problem import flat

        begin = time.perf_counter()
        try:
            gradient = flat(self.call()).tolist()
            first, last, spent = time.perf_counter() - begin, math.inf, 0.0
            while spent < WARM:
                last = timed(self.call, 1)[0]
                spent += last
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        return {"first": first, "seconds": last, "calls": math.ceil(TURN / last), "gradient": gradient}

    def turn(self, calls: int) -> dict[str, float]:
        """Make some calls; return wall and processor seconds of one, on average."""
        wall, processor = timed(self.call, calls)
        return {"wall": wall, "processor": processor}

    def units(self) -> dict[str, float]:
        """Return the seconds of each unit of the cost model, on average over a turn."""
        from paper_repro.peers.units import units

        if not self._measured:
            self._measured = units(self.problem)
            for unit in self._measured.values():
                timed(unit, 2)
        found = {}
        for name, unit in self._measured.items():
            once = timed(unit, 1)[0]
            found[name] = timed(unit, min(1000, math.ceil(TURN / 2 / once)))[0]
        return found

    def peak(self) -> dict[str, int]:
        """Return the bytes that one call takes at most above what the process had before."""
        from paper_repro.peak import reset_peak, resident

        start = reset_peak()
        self.call()
        return {"peak": resident("VmHWM") - start}


def timed(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Return the wall and the processor seconds of a call, on average over some."""
    processor, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - wall) / calls, (time.process_time() - processor) / calls


def _reference(job: Job) -> list[float]:
    import torch

    from paper_repro.peers.problem import Problem
    from paper_repro.peers.reference import reference
    from paper_repro.peers.workloads import WORKLOADS

    torch.set_num_threads(job.threads)
    workload = WORKLOADS[job.workload]
    found: list[float] = reference(
        Problem(workload, job.estimator, job.products, workload.drawn(job.size, job.seed))
    ).tolist()
    return found


if __name__ == "__main__":
    main()
