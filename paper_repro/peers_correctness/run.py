"""Running the comparison: every question to every method of every peer that is installed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper_repro.experiment import Experiment, Request, swept
from paper_repro.peers_correctness import networks, quadratics
from paper_repro.peers_correctness.judge import Outcome, judge_peer
from paper_repro.peers_correctness.methods import PEERS
from paper_repro.peers_correctness.problem import Question
from paper_repro.peers_correctness.report import details, notes, summary
from paper_repro.results import environment, write_json


@dataclass(frozen=True)
class Settings:
    """The sizes of the questions.

    Attributes:
        condition: of the ill-conditioned quadratic.
        images: that the convnet is trained on.
        updates: that train it.
    """

    condition: float
    images: int
    updates: int


PRESETS: dict[str, Settings] = {
    "smoke": Settings(condition=10.0, images=32, updates=20),
    "cpu": Settings(condition=100.0, images=200, updates=100),
}


def questions(settings: Settings, seed: int) -> list[Question]:
    """Return all questions, drawn with a seed."""
    return [
        quadratics.well_conditioned(seed),
        quadratics.no_direct(seed),
        quadratics.ill_conditioned(seed, settings.condition),
        quadratics.twice_identity(seed),
        quadratics.coupled(seed),
        quadratics.small(seed),
        quadratics.small_rate(seed),
        networks.logistic(seed),
        networks.far_start(seed),
        networks.net(seed),
        networks.few_steps(seed, "sgd"),
        networks.few_steps(seed, "momentum"),
        networks.few_steps(seed, "adam"),
        quadratics.undefined(seed),
        quadratics.undefined_slope(seed),
        networks.convnet(seed, settings.images, settings.updates),
    ]


def run(request: Request) -> Sequence[Path]:
    """Run a request: print the table, write `results.json` and `table.txt`.

    Args:
        request: what the user asked for; its methods are peers.

    Returns:
        The paths written.
    """
    versions = {name: PEERS[name].version() for name in request.methods}
    written: list[Path] = []
    for found in swept(
        request,
        "peers-correctness",
        PRESETS[request.preset],
        cell,
        request.methods,
        header=lambda s: f"{len(questions(s, 0))} questions to {', '.join(request.methods)}",
        line=said,
    ):
        asked = questions(found.settings, request.seeds - 1)
        outcomes = [Outcome(**row) for rows in found.rows for row in rows]
        text = "\n\n".join([summary(outcomes, versions), details(outcomes, asked), notes(outcomes, asked)])
        print(f"\n{found.title}\n\n{text}" if found.title else f"\n{text}")
        content = {
            "experiment": "peers-correctness",
            "preset": request.preset,
            "settings": asdict(found.settings),
            "seeds": list(range(request.seeds)),
            "versions": versions,
            "environment": environment(),
            "threads": found.threads,
            "outcomes": [{**asdict(o), "error": _plain(o.error)} for o in outcomes],
        }
        results = write_json(found.out / "results.json", content)
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        written += [results, found.out / "table.txt"]
    return written


def cell(*, settings: Settings, method: str, seed: int) -> list[dict[str, Any]]:
    """Put all questions to a library.

    Args:
        settings: the questions' sizes.
        method: the library's name.
        seed: decides the questions.

    Returns:
        The outcomes as plain data.
    """
    return [asdict(outcome) for outcome in judge_peer(PEERS[method], questions(settings, seed), seed)]


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a line what a cell came to."""
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(row["verdict"] for row in rows).items())


def _plain(error: float | None) -> float | str | None:
    """Return an error as JSON has it, which knows no infinity."""
    return "inf" if error is not None and math.isinf(error) else error


EXPERIMENT = Experiment(
    name="peers-correctness",
    summary="hypergradients of peer libraries and of this one on problems whose answers are known",
    source="betty-ml, higher, torchopt and boat-torch as pip installs them; each method's own target",
    datasets=("known-answers",),
    presets=PRESETS,
    methods=tuple(PEERS),
    run=run,
)
