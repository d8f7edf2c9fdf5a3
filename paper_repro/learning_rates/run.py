"""Running the experiment: a grid search and the learned runs on each seed, the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paper_repro.data import load
from paper_repro.experiment import Experiment, Request, swept
from paper_repro.learning_rates.differences import STEPS, relative_error
from paper_repro.learning_rates.figure import draw_figure
from paper_repro.learning_rates.learn import learn
from paper_repro.learning_rates.methods import METHODS
from paper_repro.learning_rates.problem import Problem, Settings, draw
from paper_repro.learning_rates.report import summary
from paper_repro.learning_rates.search import least, search
from paper_repro.results import environment, write_json

PRESETS: dict[str, dict[str, Settings]] = {
    "smoke": {"digits": Settings(train=100, valid=100, hidden=8, inner=10, outer=4, fine=19, upper_rate=1.5)},
    "cpu": {"digits": Settings()},
}
SEARCHES: dict[str, Callable[[Settings], int]] = {"grid": lambda s: s.grid, "fine": lambda s: s.fine}
"""How many rates each search tries."""


@dataclass
class Outcome:
    """What one row of the table did on one seed.

    Attributes:
        method: the method's name; `grid` and `fine` for the searches.
        seed: the seed.
        valid: the least validation loss, of a search's rates or of a run's updates, none included.
        test: test loss of that training.
        accuracy: its test accuracy.
        trainings: how many trainings it took.
        seconds: wall seconds of these.
        rate: the rate that was chosen, or learned; None where there are several.
        last: validation loss after a run's last update; None for searches.
        path: (rate, validation loss) pairs: of a grid, or after each update of a run with one rate.
        curve: the validation loss after each update, none included; empty for searches.
        best: the number of updates after which it was least.
        errors: the hypergradient's relative errors at the start, halfway to the chosen update and there; empty for searches.
        learned: the chosen hyperparameters, by name, where there are at most as many as steps; empty for searches.
    """

    method: str
    seed: int
    valid: float
    test: float
    accuracy: float
    trainings: int
    seconds: float
    rate: float | None = None
    last: float | None = None
    path: list[tuple[float, float]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    best: int | None = None
    errors: list[float] = field(default_factory=list)
    learned: dict[str, float | list[float]] = field(default_factory=dict)


def run(request: Request) -> Sequence[Path]:
    """Run a request: print the table, write `results.json` and the figure.

    Args:
        request: what the user asked for.

    Returns:
        The paths written.
    """
    data = load(request.dataset, request.data_dir)
    written: list[Path] = []
    for found in swept(
        request,
        "learning-rates",
        PRESETS[request.preset][request.dataset],
        cell,
        (*SEARCHES, *request.methods),
        header=lambda s: (
            f"learning rates on {data.source}: {s.train:,} training and {s.valid:,} validation examples; trainings of "
            f"{s.inner} steps; a grid of {s.grid} rates from {s.lowest:g} to {s.highest:g}; {s.outer} updates of what is "
            "learned"
        ),
        line=said,
        dataset=request.dataset,
        data_dir=request.data_dir,
    ):
        outcomes = [Outcome(**row) for row in found.rows]
        text = summary(outcomes)
        print(f"\n{found.title}\n\n{text}" if found.title else f"\n{text}")
        results = write_json(
            found.out / "results.json",
            {
                "experiment": "learning-rates",
                "dataset": data.name,
                "source": data.source,
                "preset": request.preset,
                "settings": asdict(found.settings),
                "difference_steps": STEPS,
                "seeds": list(range(request.seeds)),
                "environment": environment(),
                "threads": found.threads,  # that were used, of those of the environment
                "outcomes": [asdict(outcome) for outcome in outcomes],
            },
        )
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        written += [results, found.out / "table.txt", draw_figure(found.out / "figure.png", data, outcomes)]
    return written


def cell(*, settings: Settings, method: str, seed: int, dataset: str, data_dir: Path | None) -> dict[str, Any]:
    """Run a search or a method on one draw.

    Args:
        settings: sizes and rates.
        method: a name in SEARCHES or METHODS.
        seed: decides the draw.
        dataset: a data set's name.
        data_dir: where it is looked for first.

    Returns:
        The outcome as plain data.
    """
    problem = draw(load(dataset, data_dir), settings, seed)
    if method in SEARCHES:
        return asdict(searched(problem, settings, method, SEARCHES[method](settings), seed))
    return asdict(learned(problem, settings, method, seed))


def said(row: dict[str, Any]) -> str:
    """Say in a line what a cell came to."""
    curve = row["curve"]
    score = f"{curve[0]:.4f} before, {curve[-1]:.4f} after" if curve else f"{row['valid']:.4f}"
    return f"validation loss {score}"


def searched(problem: Problem, settings: Settings, name: str, count: int, seed: int) -> Outcome:
    """Search a grid of rates on one draw.

    Args:
        problem: the draw.
        settings: sizes and rates.
        name: what to call it.
        count: the number of rates.
        seed: the draw's seed.

    Returns:
        The outcome.
    """
    begin = time.perf_counter()
    grid = search(problem, settings, count)
    seconds = time.perf_counter() - begin
    rate, score = least(grid)
    path = [(tried, found.valid) for tried, found in grid]
    return Outcome(name, seed, score.valid, score.test, score.accuracy, count, seconds, rate, path=path)


def learned(problem: Problem, settings: Settings, method: str, seed: int) -> Outcome:
    """Learn by one method on one draw, and hold its hypergradients against differences.

    Args:
        problem: the draw.
        settings: sizes and rates.
        method: a name in METHODS.
        seed: the draw's seed.

    Returns:
        The outcome.
    """
    found = learn(problem, settings, method)
    best, curve, path = found.best, [score.valid for score in found.scores], found.path
    chosen, places = found.scores[best], (0, best // 2, best)
    rates = [float(step["log_rate"].exp()) for step in path] if path[0].keys() == {"log_rate"} else []
    return Outcome(
        method,
        seed,
        chosen.valid,
        chosen.test,
        chosen.accuracy,
        len(curve),
        found.seconds,
        rate=rates[best] if rates else None,
        last=curve[-1],
        path=list(zip(rates, curve, strict=True)) if rates else [],
        curve=curve,
        best=best,
        errors=[relative_error(found.program, found.states[place]) for place in places],
        learned={name: x.tolist() for name, x in path[best].items() if x.numel() <= settings.inner and x.dim() < 2},
    )


EXPERIMENT = Experiment(
    name="learning-rates",
    summary="learn learning rates by hypergradients, and hold them against a grid search",
    source="Maclaurin et al. 2015 (arXiv 1502.03492); Franceschi et al. 2017 (arXiv 1703.01785); Li et al. 2017 (Meta-SGD)",
    datasets=("digits",),
    presets=PRESETS,
    methods=tuple(METHODS),
    run=run,
)
