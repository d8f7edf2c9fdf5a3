"""Choosing the regularizers, on digits that no table measures on: `python -m paper_repro.domains.tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from paper_repro.data import Dataset, load
from paper_repro.domains.baselines import BASELINES
from paper_repro.domains.learn import learn
from paper_repro.domains.methods import METHODS, variant
from paper_repro.domains.presets import PRESETS
from paper_repro.domains.problem import Domains, Settings, draw
from paper_repro.results import environment, write_json

SEEDS = range(100, 105)
DECAYS = (3e-3,)  # 1e-2 changes «uniform» by 0.001 and is worse for «oracle»
PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 3e-1, 1.0)
GRID = tuple(product(DECAYS, PULLS))


def main() -> None:
    """Tune every row and write `recorded/tuning.json`."""
    torch.set_num_threads(1)
    data, settings = load("digits"), PRESETS["cpu"]["digits"]
    rows: dict[str, Any] = {}
    path = Path(__file__).parent / "recorded" / "tuning.json"
    for name in (*BASELINES, *METHODS):
        rows[name] = tune(data, settings, name)
        print(name, {part: found["chosen"] for part, found in rows[name].items()}, flush=True)
        write_json(path, {"seeds": list(SEEDS), "grid": GRID, "rows": rows, "environment": environment()})


def tune(data: Dataset, settings: Settings, name: str) -> dict[str, Any]:
    """Find the regularizers under which a row is most accurate on training digits that it did not get.

    Args:
        data: the digits.
        settings: the sizes.
        name: a baseline's or a method's name.

    Returns:
        For `"train"` and for `"both"` (see `Tuned`) the mean accuracy at each point of the grid, and the best point.
    """
    problems = [draw(data, settings, seed, tuning=True) for seed in SEEDS]
    if name in BASELINES:
        train = _measure(problems, lambda problem, _: problem.accuracy(BASELINES[name](problem)))
        both = _measure(problems, lambda problem, _: problem.accuracy(BASELINES[name](problem.with_validation())))
        return {"train": train, "both": both}
    runs: dict[tuple[float, float], list[Tensor]] = {point: [] for point in GRID}

    def run(problem: Domains, _: int) -> float:
        learned = learn(problem, settings, name)
        runs[problem.decay, problem.pull].append(learned.reweight)
        return learned.curve[-1]

    train = _measure(problems, run)
    weights = runs[tuple(train["chosen"])]
    both = _measure(problems, lambda p, i: p.accuracy(variant(p, name).with_validation().pipeline(weights[i])))
    return {"train": train, "both": both}


def _measure(problems: Sequence[Domains], accuracy: Callable[[Domains, int], float]) -> dict[str, Any]:
    """Go over the grid; at equal accuracy the first point is taken."""
    means = []
    for decay, pull in GRID:
        moved = [replace(problem, decay=decay, pull=pull) for problem in problems]
        means.append(fmean(accuracy(problem, i) for i, problem in enumerate(moved)))
    return {"accuracy": means, "chosen": GRID[means.index(max(means))]}


if __name__ == "__main__":
    main()
