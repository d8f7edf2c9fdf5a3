"""Running the comparison: every question to every method of every peer that is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from paper_repro.experiment import Experiment, Request
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
    settings = PRESETS[request.preset]
    versions = {name: PEERS[name].version() for name in request.methods}
    outcomes: list[Outcome] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few numbers
    try:
        with tqdm(total=request.seeds * len(request.methods), leave=False, disable=None) as bar:
            for seed in range(request.seeds):
                asked = questions(settings, seed)
                for name in request.methods:
                    bar.set_description(f"seed {seed} {name}")
                    outcomes += judge_peer(PEERS[name], asked, seed)
                    bar.update()
    finally:
        torch.set_num_threads(threads)
    text = "\n\n".join([summary(outcomes, versions), details(outcomes, asked), notes(outcomes, asked)])
    print(f"\n{text}")
    content = {
        "experiment": "peers-correctness",
        "preset": request.preset,
        "settings": asdict(settings),
        "seeds": list(range(request.seeds)),
        "versions": versions,
        "environment": environment(),
        "outcomes": [{**asdict(o), "error": _plain(o.error)} for o in outcomes],
    }
    results = write_json(request.out / "results.json", content)
    (request.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    return results, request.out / "table.txt"


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
