"""Running the experiment: baselines, one three-level run per method and seed, Taylor tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from paper_repro.data import Dataset, load
from paper_repro.domains.baselines import BASELINES
from paper_repro.domains.figure import draw_figure
from paper_repro.domains.learn import Learned, learn
from paper_repro.domains.methods import METHODS, variant
from paper_repro.domains.presets import PRESETS, TUNED, Strength
from paper_repro.domains.problem import Domains, Settings, draw
from paper_repro.domains.report import summary
from paper_repro.domains.styles import SOURCES
from paper_repro.domains.taylor import SIZES, remainders
from paper_repro.experiment import Experiment, Request, swept
from paper_repro.results import environment, write_json


@dataclass
class Outcome:
    """What one row of the table did on one seed.

    Attributes:
        method: the method's or baseline's name.
        seed: the seed.
        accuracy: on the target's test examples, finetuned on its training examples.
        both: the same, finetuned on its validation examples too.
        curve: the accuracy after 0, 1, … updates of the third level; empty for baselines.
        cost: the third level's cost there.
        relative: each source's learned weight relative to uniform weights, which have 1; empty for baselines.
        remainders: of the Taylor test, one for each of `taylor.SIZES`, at the first, the middle and the last state.
        converged: whether all linear systems were solved; None where there was none.
        seconds: wall seconds of the run, measuring left out; None for baselines.
    """

    method: str
    seed: int
    accuracy: float
    both: float
    curve: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    remainders: dict[str, list[float]] = field(default_factory=dict)
    converged: bool | None = None
    seconds: float | None = None


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
        "domains",
        PRESETS[request.preset][request.dataset],
        cell,
        (*BASELINES, *request.methods),
        header=lambda s: (
            f"domains on {data.source}: {s.per_source} examples from each of {len(SOURCES)} sources; of the target "
            f"{s.train} to finetune on, {s.valid} for the third level and {len(data.x_test)} to test on; "
            f"{s.outer} updates of the third level"
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
                "experiment": "domains",
                "dataset": data.name,
                "source": data.source,
                "preset": request.preset,
                "settings": asdict(found.settings),
                "tuned": {name: asdict(tuned) for name, tuned in TUNED.items()},
                "sources": [source.name for source in SOURCES],
                "taylor_sizes": SIZES,
                "seeds": list(range(request.seeds)),
                "environment": environment(),
                "threads": found.threads,  # that were used, of those of the environment
                "outcomes": [asdict(o) for o in outcomes],
            },
        )
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        written += [results, found.out / "table.txt", draw_figure(found.out / "figure.png", data, outcomes)]
    return written


def cell(*, settings: Settings, method: str, seed: int, dataset: str, data_dir: Path | None) -> dict[str, Any]:
    """Run a baseline or a method on one draw.

    Args:
        settings: sizes and rates.
        method: a name in BASELINES or METHODS.
        seed: decides the draw.
        dataset: a data set's name.
        data_dir: where it is looked for first.

    Returns:
        The outcome as plain data.
    """
    return asdict(outcome(load(dataset, data_dir), settings, method, seed))


def said(row: dict[str, Any]) -> str:
    """Say in a line what a cell came to."""
    curve = row["curve"]
    score = f"{curve[0]:.3f} before, {curve[-1]:.3f} after" if curve else f"{row['accuracy']:.3f}"
    return f"test accuracy {score}"


def outcome(data: Dataset, settings: Settings, name: str, seed: int) -> Outcome:
    """Run a row of the table, whichever it is, on one draw."""
    return (baseline if name in BASELINES else method)(data, settings, name, seed)


def baseline(data: Dataset, settings: Settings, name: str, seed: int) -> Outcome:
    """Run a baseline on one draw, once for each set of examples to finetune on.

    Args:
        data: the digits.
        settings: sizes.
        name: a name in BASELINES.
        seed: decides the draw.

    Returns:
        The outcome.
    """
    problem, tuned = draw(data, settings, seed), TUNED[name]
    train, both = regularized(problem, tuned.train), regularized(problem, tuned.both)
    classify = BASELINES[name]
    return Outcome(name, seed, train.accuracy(classify(train)), both.accuracy(classify(both.with_validation())))


def method(data: Dataset, settings: Settings, name: str, seed: int) -> Outcome:
    """Learn the weights by one method on one draw, and put its hypergradients to the Taylor test.

    Args:
        data: the digits.
        settings: sizes and rates.
        name: a name in METHODS.
        seed: decides the draw.

    Returns:
        The outcome.
    """
    problem, tuned = draw(data, settings, seed), TUNED[name]
    found = learn(regularized(problem, tuned.train), settings, name)
    both = regularized(variant(problem, name), tuned.both).with_validation()
    weights = found.problem.weights(found.reweight)
    sums = weights.new_zeros(len(SOURCES)).index_add(0, problem.source, weights)
    return Outcome(
        name,
        seed,
        found.curve[-1],
        both.accuracy(both.pipeline(found.reweight)),
        curve=found.curve,
        cost=found.cost,
        relative=(sums * len(SOURCES)).tolist(),
        remainders=taylor(found),
        converged=found.converged,
        seconds=found.seconds,
    )


def taylor(learned: Learned) -> dict[str, list[float]]:
    """Return the Taylor remainders at the first, the middle and the last state of a run."""
    last = len(learned.states) - 1
    places = {"first": 0, "middle": last // 2, "last": last}
    return {name: remainders(learned.program, learned.states[place]) for name, place in places.items()}


def regularized(problem: Domains, strength: Strength) -> Domains:
    """Return the problem with these regularizers."""
    return replace(problem, decay=strength.decay, pull=strength.pull)


EXPERIMENT = Experiment(
    name="domains",
    summary="pretrain, finetune, reweight: three levels learn which styles of source data help a target style",
    source="Choe et al. 2023 (Betty, arXiv 2207.02849, data reweighting for domain adaptation)",
    datasets=("digits",),
    presets=PRESETS,
    methods=tuple(METHODS),
    run=run,
)
