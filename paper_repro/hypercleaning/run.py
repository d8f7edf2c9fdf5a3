"""Running hyper-cleaning: baselines, one bilevel run per method and seed, the table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from paper_repro.data import Dataset, load
from paper_repro.experiment import Experiment, Request
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
    settings = PRESETS[request.preset][request.dataset]
    print(
        f"hyper-cleaning on {data.source}: {settings.train:,} training examples, {settings.corrupted:.0%} of whose labels "
        f"are wrong; {settings.valid:,} clean validation examples; {settings.outer} upper steps of {settings.inner} "
        "lower ones",
        flush=True,
    )
    outcomes: list[Outcome] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        for seed in range(request.seeds):
            outcomes += one_seed(data, settings, request.methods, seed)
    finally:
        torch.set_num_threads(threads)
    text = summary(outcomes)
    print(f"\n{text}")
    results = write_json(
        request.out / "results.json",
        {
            "experiment": "hypercleaning",
            "dataset": data.name,
            "source": data.source,
            "preset": request.preset,
            "settings": asdict(settings),
            "seeds": list(range(request.seeds)),
            "environment": environment(),  # settings.threads says how many of the threads were used
            "outcomes": [{k: v for k, v in vars(o).items() if k != "weights"} for o in outcomes],
        },
    )
    (request.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    problem = draw(data, settings, seed=0)
    figure = draw_figure(request.out / "figure.png", data, problem, [o for o in outcomes if o.seed == 0])
    return results, request.out / "table.txt", figure


def one_seed(data: Dataset, settings: Settings, methods: Sequence[str], seed: int) -> list[Outcome]:
    """Run the baselines and the methods on one draw of the problem.

    Args:
        data: the data set.
        settings: sizes and rates.
        methods: names in METHODS.
        seed: decides the draw.

    Returns:
        One outcome each, baselines first.
    """
    problem = draw(data, settings, seed)
    begin = problem.classifier()
    clean = problem.clean
    noisy = problem.accuracy(fit(problem.x, problem.given, begin, settings.decay))
    small = problem.accuracy(fit(problem.x_valid, problem.y_valid, begin, settings.decay))
    oracle = problem.accuracy(fit(problem.x[clean], problem.given[clean], begin, settings.decay))
    baselines = [Outcome(name, seed, value) for name, value in zip(BASELINES, (noisy, small, oracle), strict=True)]
    return baselines + [bilevel(problem, settings, name, seed, (noisy, oracle)) for name in methods]


def bilevel(problem: Cleaning, settings: Settings, method: str, seed: int, gap: tuple[float, float]) -> Outcome:
    """Learn the weights by one method, and hold its last hypergradient against the reference.

    Args:
        problem: the data and costs.
        settings: sizes and rates.
        method: a name in METHODS.
        seed: the program's seed.
        gap: test accuracy of noisy and of oracle training.

    Returns:
        The outcome.
    """
    cleaner = program(problem, settings, METHODS[method](settings))
    state = cleaner.init({"classifier": problem.classifier(), "weights": torch.zeros(len(problem.x))}, seed=seed)
    curve, seconds, hvps = [(0, problem.accuracy(state.params["classifier"]))], 0.0, 0
    before = state
    with tqdm(range(1, settings.outer + 1), desc=f"seed {seed} {method:18}", leave=False, disable=None) as bar:
        for step in bar:
            before = state
            start = time.perf_counter()
            state, metrics = cleaner.step(state, {})
            seconds += time.perf_counter() - start
            stats = metrics["weights"]["stats"]["classifier"]
            hvps += stats.hvps + stats.steps
            if step % settings.evaluate_every == 0 or step == settings.outer:
                curve.append((step, problem.accuracy(state.params["classifier"])))
                bar.set_postfix(accuracy=f"{curve[-1][1]:.3f}", validation=f"{float(metrics['weights']['cost']):.3f}")
    exact, how = reference(problem, settings, before.params["weights"])
    error, cosine = compare(cleaner.hypergradient(before, {}, of="weights"), exact)
    noisy, oracle = gap
    accuracy, weights = curve[-1][1], torch.sigmoid(state.params["weights"])
    quality = auc(weights, problem.clean)
    print(f"seed {seed}  {method}: test accuracy {accuracy:.3f}, AUC {quality:.3f}", flush=True)
    return Outcome(
        method,
        seed,
        accuracy,
        auc=quality,
        gap=(accuracy - noisy) / (oracle - noisy) if oracle > noisy else None,
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
