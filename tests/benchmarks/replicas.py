"""What many copies of a program cost by `fm.Replicas`: their time over that of one copy, as it is written and replayed.

Run it with `python -m tests.benchmarks.replicas`. The problem is a logistic regression of 500 examples with 20 features; its
log weight decays, one for each feature, are the upper level's. An outer step is 100 inner ones and one above. One step of
a single program, twice, and one of all copies are timed in turn; the table gives medians, and medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, or idle threads spin

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm

EXAMPLES, FEATURES, STEPS = 500, 20, 100
RESPONSES = {"ITD": fm.ITD(), "CG, 10 products": fm.AID(fm.CG(10)), "finite difference": fm.FiniteDifference()}


def fit(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(x @ w, y) + (decay.exp() * w**2).mean() / 2


def validate(decay: Tensor, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(x @ w, y)


def drawn(copies: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw data sets for all copies, each with a true w of its own."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(copies, FEATURES, 1, generator=draw)

    def part() -> tuple[Tensor, Tensor]:
        x = torch.randn(copies, EXAMPLES, FEATURES, generator=draw)
        noise = torch.randn(copies, EXAMPLES, generator=draw)
        return x, ((x @ truth).squeeze(-1) + noise > 0).float()

    return {"w": part(), "decay": part()}


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(response: fm.BestResponse, copies: int, repeats: int) -> tuple[float, float, float, float, float]:
    """Time one outer step of one program, as it is written and replayed, and of all copies, in turn.

    Returns:
        Median seconds of the three, and the median ratios of all to each of the others.
    """

    def program(replay: bool) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("w", fit, torchopt.sgd(0.5), steps=STEPS, response=response, replay=replay),
            fm.Level("decay", validate, torchopt.adam(0.1)),
        )

    written, replayed = program(replay=False), program(replay=True)
    starts = [{"w": torch.zeros(FEATURES), "decay": torch.full((FEATURES,), -3.0 + 0.02 * i)} for i in range(copies)]
    states, batches = [written.init(start) for start in starts], drawn(copies)
    many = fm.Replicas(written)
    stacked, first = many.stack(states), {name: (x[0], y[0]) for name, (x, y) in batches.items()}
    calls = (
        lambda: written.step(states[0], first),
        lambda: replayed.step(states[0], first),
        lambda: many.step(stacked, batches),
    )
    turns = [tuple(map(seconds, calls)) for _ in range(repeats + 2)][2:]
    one, quick, together = (statistics.median(column) for column in zip(*turns, strict=True))
    ratios = (statistics.median(turn[2] / turn[k] for turn in turns) for k in (0, 1))
    return one, quick, together, *ratios


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=64, help="copies of the program")
    parser.add_argument("--repeats", type=int, default=21, help="turns that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"logistic regression {EXAMPLES} x {FEATURES}, {STEPS} inner steps, {arguments.copies} copies, one thread")
    columns = ("one as written, ms", 18), ("one replayed, ms", 17), ("all, ms", 8), ("all / written", 14), ("/ replayed", 11)
    print(f"{'response':<20}", *(f"{name:>{width}}" for name, width in columns))
    for name, response in RESPONSES.items():
        one, quick, together, ratio, harder = measure(response, arguments.copies, arguments.repeats)
        print(
            f"{name:<20} {1e3 * one:>18.1f} {1e3 * quick:>17.1f} {1e3 * together:>8.1f} {ratio:>14.2f} {harder:>11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
