"""Running hyper-cleaning: baselines, one bilevel run per method and seed, the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from paper_repro.data import load
from paper_repro.experiment import Experiment, Request, swept
from paper_repro.hypercleaning.figure import draw_figure
from paper_repro.hypercleaning.methods import METHODS, program
from paper_repro.hypercleaning.problem import Cleaning, Settings, auc, draw, fit
from paper_repro.hypercleaning.reference import compare, reference
from paper_repro.results import environment, spread, table, write_json

_SMOKE = Settings(train=200, valid=100, outer=6, inner=5, lower_lr=0.1, evaluate_every=2)

PRESETS: dict[str, dict[str, Settings]] = {
    "smoke": {
        "digits": Settings(train=200, valid=100, outer=6, inner=5, evaluate_every=2, threads=1),
        "mnist": _SMOKE,
        "fashion-mnist": _SMOKE,
    },
    "cpu": {
        "digits": Settings(train=997, valid=250, outer=120, decay=2e-4, threads=1),
        "mnist": Settings(train=2_000, valid=500, outer=150, lower_lr=0.1),
        "fashion-mnist": Settings(train=2_000, valid=500, outer=150, lower_lr=0.1),
    },
    "paper": {
        "digits": Settings(train=997, valid=250, outer=1_000, decay=2e-4, terms=20, threads=1),
        "mnist": Settings(train=5_000, valid=5_000, outer=1_000, lower_lr=0.1, terms=20),
        "fashion-mnist": Settings(train=5_000, valid=5_000, outer=1_000, lower_lr=0.1, terms=20),
    },
}

BASELINES = {
    "noisy labels": "plain training on all labels as given",
    "clean set only": "plain training on the small clean validation set alone",
    "oracle": "plain training on the rightly labelled part of the training set",
}
PLAIN = "baselines"
"""The cell that has all of them."""


@dataclass
class Outcome:
    """What one method did on one seed.

    Attributes:
        method: the method's or baseline's name.
        seed: the seed.
        accuracy: test accuracy at the end.
        auc: how well the weights tell right from wrong labels; None for baselines.
        gap: the share of the accuracy gap between noisy and oracle training that was closed; None for baselines.
        error: relative error of the last hypergradient; None for baselines.
        cosine: its cosine with the reference; None for baselines.
        reference: how the reference was had; None for baselines.
        seconds: wall seconds of the run, evaluation left out.
        hvps: Hessian-vector products (for ITD, differentiated inner steps, each of which costs about one).
        curve: (upper step, test accuracy) pairs.
        weights: σ(weights) at the end, (n,); not written to disk.
    """

    method: str
    seed: int
    accuracy: float
    auc: float | None = None
    gap: float | None = None
    error: float | None = None
    cosine: float | None = None
    reference: str | None = None
    seconds: float | None = None
    hvps: int | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    weights: Tensor | None = None


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
        "hypercleaning",
        PRESETS[request.preset][request.dataset],
        cell,
        (PLAIN, *request.methods),
        header=lambda s: (
            f"hyper-cleaning on {data.source}: {s.train:,} training examples, {s.corrupted:.0%} of whose labels are wrong; "
            f"{s.valid:,} clean validation examples; {s.outer} upper steps of {s.inner} lower ones"
        ),
        line=said,
        dataset=request.dataset,
        data_dir=request.data_dir,
        bar=request.jobs == 1 and request.dask is None,
    ):
        outcomes = with_gaps([Outcome(**row) for rows in found.rows for row in rows])
        text = summary(outcomes)
        print(f"\n{found.title}\n\n{text}" if found.title else f"\n{text}")
        results = write_json(
            found.out / "results.json",
            {
                "experiment": "hypercleaning",
                "dataset": data.name,
                "source": data.source,
                "preset": request.preset,
                "settings": asdict(found.settings),
                "seeds": list(range(request.seeds)),
                "environment": environment(),
                "threads": found.threads,  # that were used, of those of the environment
                "outcomes": [{k: v for k, v in vars(o).items() if k != "weights"} for o in outcomes],
            },
        )
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        problem = draw(data, found.settings, seed=0)
        figure = draw_figure(found.out / "figure.png", data, problem, [o for o in outcomes if o.seed == 0])
        written += [results, found.out / "table.txt", figure]
    return written


def cell(
    *, settings: Settings, method: str, seed: int, dataset: str, data_dir: Path | None, bar: bool
) -> list[dict[str, Any]]:
    """Run a method, or all baselines, on one draw of the problem.

    Args:
        settings: sizes and rates.
        method: a name in METHODS, or PLAIN.
        seed: decides the draw.
        dataset: a data set's name.
        data_dir: where it is looked for first.
        bar: whether to show a progress bar.

    Returns:
        The outcomes as plain data.
    """
    problem = draw(load(dataset, data_dir), settings, seed)
    if method == PLAIN:
        return [vars(outcome) for outcome in baselines(problem, settings, seed)]
    return [vars(bilevel(problem, settings, method, seed, bar=bar))]


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a line what a cell came to."""
    if len(rows) > 1:
        return "test accuracy " + ", ".join(f"{row['accuracy']:.3f} ({row['method']})" for row in rows)
    return f"test accuracy {rows[0]['accuracy']:.3f}, AUC {rows[0]['auc']:.3f}"


def baselines(problem: Cleaning, settings: Settings, seed: int) -> list[Outcome]:
    """Run the baselines on one draw of the problem.

    Args:
        problem: the data.
        settings: sizes and rates.
        seed: the draw's seed.

    Returns:
        One outcome each.
    """
    begin, clean = problem.classifier(), problem.clean
    noisy = problem.accuracy(fit(problem.x, problem.given, begin, settings.decay))
    small = problem.accuracy(fit(problem.x_valid, problem.y_valid, begin, settings.decay))
    oracle = problem.accuracy(fit(problem.x[clean], problem.given[clean], begin, settings.decay))
    return [Outcome(name, seed, value) for name, value in zip(BASELINES, (noisy, small, oracle), strict=True)]


def with_gaps(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes with the share of the gap that each method closed, on each seed."""
    plain = {(o.method, o.seed): o.accuracy for o in outcomes if o.method in BASELINES}

    def closed(o: Outcome) -> float | None:
        noisy, oracle = plain["noisy labels", o.seed], plain["oracle", o.seed]
        return (o.accuracy - noisy) / (oracle - noisy) if oracle > noisy else None

    return [o if o.method in BASELINES else replace(o, gap=closed(o)) for o in outcomes]


def bilevel(problem: Cleaning, settings: Settings, method: str, seed: int, *, bar: bool) -> Outcome:
    """Learn the weights by one method, and hold its last hypergradient against the reference.

    Args:
        problem: the data and costs.
        settings: sizes and rates.
        method: a name in METHODS.
        seed: the program's seed.
        bar: whether to show a progress bar.

    Returns:
        The outcome, but for the gap.
    """
    cleaner = program(problem, settings, METHODS[method](settings))
    state = cleaner.init({"classifier": problem.classifier(), "weights": torch.zeros(len(problem.x))}, seed=seed)
    curve, seconds, hvps = [(0, problem.accuracy(state.params["classifier"]))], 0.0, 0
    before = state
    quiet = None if bar else True  # None is silent where there is no terminal
    with tqdm(range(1, settings.outer + 1), desc=f"seed {seed} {method:18}", leave=False, disable=quiet) as steps:
        for step in steps:
            before = state
            start = time.perf_counter()
            state, metrics = cleaner.step(state, {})
            seconds += time.perf_counter() - start
            stats = metrics["weights"]["stats"]["classifier"]
            hvps += stats.hvps + stats.steps
            if step % settings.evaluate_every == 0 or step == settings.outer:
                curve.append((step, problem.accuracy(state.params["classifier"])))
                steps.set_postfix(accuracy=f"{curve[-1][1]:.3f}", validation=f"{float(metrics['weights']['cost']):.3f}")
    exact, how = reference(problem, settings, before.params["weights"])
    error, cosine = compare(cleaner.hypergradient(before, {}, of="weights"), exact)
    accuracy, weights = curve[-1][1], torch.sigmoid(state.params["weights"])
    return Outcome(
        method,
        seed,
        accuracy,
        auc=auc(weights, problem.clean),
        error=error,
        cosine=cosine,
        reference=how,
        seconds=seconds,
        hvps=hvps,
        curve=curve,
        weights=weights,
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """Write the table over seeds, with its footnotes."""
    header = ("method", "test accuracy", "gap closed", "AUC", "hypergrad. error", "cosine", "seconds", "HVPs")
    rows = []
    for name in dict.fromkeys(o.method for o in outcomes):
        mine = [o for o in outcomes if o.method == name]
        rows.append([
            name,
            spread([o.accuracy for o in mine], ".3f"),
            spread([o.gap for o in mine], ".2f"),
            spread([o.auc for o in mine], ".3f"),
            spread([o.error for o in mine], ".2f"),
            spread([o.cosine for o in mine], ".3f"),
            spread([o.seconds for o in mine], ".1f"),
            "–" if mine[0].hvps is None else f"{mine[0].hvps:,}",
        ])
    how = " or ".join(dict.fromkeys(o.reference for o in outcomes if o.reference)) or "dense"
    seeds = len({o.seed for o in outcomes})
    notes = [
        *(f"{name}: {what}." for name, what in BASELINES.items()),
        f"error, cosine: the last step's hypergradient against the exact one (lower problem solved to rounding, {how}).",
        "finite-difference takes the inverse Hessian to be the identity: its direction counts, its size does not.",
        "HVPs: Hessian-vector products; for itd, inner steps differentiated, which cost about one each.",
        f"{seeds} seed{'s' if seeds > 1 else ''}{', mean ± standard deviation' if seeds > 1 else ''}.",
    ]
    return table(header, rows) + "\n\n" + "\n".join(notes)


EXPERIMENT = Experiment(
    name="hypercleaning",
    summary="learn which training labels to believe, from a small clean set",
    source="Franceschi et al. 2017 (arXiv 1703.01785, sec. 5.1); Lorraine et al. 2020; Choe et al. 2023 (Betty)",
    datasets=("digits", "mnist", "fashion-mnist"),
    presets=PRESETS,
    methods=tuple(METHODS),
    run=run,
)
