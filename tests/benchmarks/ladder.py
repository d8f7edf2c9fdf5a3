"""Time of one hypergradient through a ladder of 2 levels × n rungs, which has 2ⁿ paths: `python -m tests.benchmarks.ladder`.

Rounds are interleaved, and what is printed are medians relative to the shortest ladder, per rung.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import statistics
import time

import torch
import torchopt

import funcmlo as fm

RUNGS = (5, 10, 20, 40)
ROUNDS = 15


def ladder(rungs: int, size: int = 64) -> tuple[fm.Multilevel, fm.State]:
    """Each level reads both levels of the rung below; the lowest read the top, and the top reads the highest."""
    response, sgd = fm.AID(fm.CG(5)), torchopt.sgd(0.1)

    def loss(own: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return ((own - sum(others)) ** 2).sum()

    reads = {"a0": ["top"], "b0": ["top"]}
    for i in range(1, rungs):
        reads |= {f"{side}{i}": [f"a{i - 1}", f"b{i - 1}"] for side in "ab"}
    reads["top"] = [f"a{rungs - 1}", f"b{rungs - 1}"]
    levels = [fm.Level(n, loss, sgd, reads={s: s for s in sources}, response=response) for n, sources in reads.items()]
    program = fm.Multilevel(*levels)
    return program, program.init({name: torch.ones(size) for name in reads})


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    programs = {rungs: ladder(rungs) for rungs in RUNGS}
    seconds: dict[int, list[float]] = {rungs: [] for rungs in RUNGS}
    products = {}
    for _ in range(ROUNDS):
        for rungs, (program, state) in programs.items():
            begin = time.perf_counter()
            _, stats = program.hypergradient(state, {}, of="top", solve=False, with_stats=True)
            seconds[rungs].append(time.perf_counter() - begin)
            products[rungs] = sum(s.products for s in stats.values())
    base = statistics.median(seconds[RUNGS[0]]) / RUNGS[0]
    print(f"{'rungs':>5} {'levels':>6} {'paths':>15} {'products':>8} {'time / rung, relative':>21}")
    for rungs in RUNGS:
        per_rung = statistics.median(seconds[rungs]) / rungs / base
        print(f"{rungs:>5} {2 * rungs:>6} {2**rungs:>15,} {products[rungs]:>8} {per_rung:>21.2f}")


if __name__ == "__main__":
    main()
