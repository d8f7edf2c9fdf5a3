"""Running the comparison: knobs tuned, then every contender in fresh processes, in turn."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paper_repro.experiment import Experiment, Request, swept
from paper_repro.peers_accuracy.contenders import CONTENDERS
from paper_repro.peers_accuracy.course import Settings, record
from paper_repro.peers_accuracy.figure import draw_figure
from paper_repro.peers_accuracy.report import summary
from paper_repro.results import environment, write_json

PRESETS: dict[str, Settings] = {
    "smoke": Settings(train=80, valid=40, outer=3, decay=1e-2, lower_lr=2.0, momentum=0.7, free=1, memory=20, repeats=1),
    "cpu": Settings(train=997, valid=250, outer=60),
}


@dataclass
class Outcome:
    """What one contender did on one draw.

    Attributes:
        contender: its name.
        seed: the draw.
        version: its library's; empty for code of this folder, None if it is not installed.
        knobs: those it was tuned to; None if it has no answer.
        why: why it has none.
        seconds: wall seconds of the whole course, run by run.
        processor: processor seconds of the same.
        steps: wall seconds of each outer step, the median over runs.
        errors: the relative error of each hypergradient, in the first run.
    """

    contender: str
    seed: int
    version: str | None
    knobs: dict[str, float] | None = None
    why: str | None = None
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def run(request: Request) -> Sequence[Path]:
    """Run a request: print the table, write `results.json`, `table.txt` and the figure.

    Args:
        request: what the user asked for; its methods are contenders.

    Returns:
        The paths written.
    """
    written: list[Path] = []
    for found in swept(
        request,
        "peers-accuracy",
        PRESETS[request.preset],
        cell,
        ("+".join(request.methods),),  # one cell, because they take turns
        header=lambda s: (
            f"{s.outer} hypergradients within {s.tolerance:g}: {s.train:,} weights, {', '.join(request.methods)}; "
            f"{s.repeats} runs each"
        ),
        line=said,
    ):
        outcomes = [Outcome(**row) for rows in found.rows for row in rows]
        text = summary(outcomes, found.settings)
        print(f"\n{found.title}\n\n{text}" if found.title else f"\n{text}")
        results = write_json(
            found.out / "results.json",
            {
                "experiment": "peers-accuracy",
                "preset": request.preset,
                "settings": asdict(found.settings),
                "seeds": list(range(request.seeds)),
                "environment": environment(),
                "threads": 1,
                "outcomes": [asdict(outcome) for outcome in outcomes],
            },
        )
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        figure = draw_figure(found.out / "figure.png", [o for o in outcomes if o.seed == 0], found.settings)
        written += [results, found.out / "table.txt", figure]
    return written


def cell(*, settings: Settings, method: str, seed: int) -> list[dict[str, Any]]:
    """Tune all contenders and let them run in turn, on one draw.

    Args:
        settings: the problem and the rules.
        method: the contenders' names, joined by "+".
        seed: decides the draw.

    Returns:
        The outcomes as plain data.
    """
    outcomes = [Outcome(name, seed, version(name)) for name in method.split("+")]
    with tempfile.TemporaryDirectory() as folder:
        course = record(settings, seed).save(Path(folder) / "course.pt")
        for outcome in outcomes:
            if outcome.version is None:
                outcome.why = "not installed"
                continue
            found = ask(settings, seed, course, outcome.contender, None)
            outcome.knobs, outcome.why = found.get("knobs"), found.get("failed") or found.get("why")
            told = outcome.why or ", ".join(f"{name} {value:g}" for name, value in (outcome.knobs or {}).items())
            print(f"  {outcome.contender}: {told}", flush=True)
        running = [outcome for outcome in outcomes if outcome.knobs]
        steps: dict[str, list[list[float]]] = {outcome.contender: [] for outcome in running}
        for turn in range(settings.repeats):
            for outcome in running if turn % 2 == 0 else reversed(running):
                found = ask(settings, seed, course, outcome.contender, outcome.knobs)
                outcome.seconds.append(sum(found["seconds"]))
                outcome.processor.append(sum(found["processor"]))
                outcome.errors = outcome.errors or found["errors"]
                steps[outcome.contender].append(found["seconds"])
        for outcome in running:
            outcome.steps = [sorted(several)[len(several) // 2] for several in zip(*steps[outcome.contender], strict=True)]
    return [asdict(outcome) for outcome in outcomes]


def ask(settings: Settings, seed: int, course: Path, contender: str, knobs: dict[str, float] | None) -> dict[str, Any]:
    """Give a fresh process one task.

    Args:
        settings: the rules.
        seed: the draw.
        course: where the course lies.
        contender: who.
        knobs: with which; None to tune them.

    Returns:
        What the process found.
    """
    task = {"contender": contender, "settings": asdict(settings), "seed": seed, "course": str(course), "knobs": knobs}
    command = [sys.executable, "-m", "paper_repro.peers_accuracy.worker"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def version(contender: str) -> str | None:
    """Return the version of a contender's library; empty for code of this folder, None if it is not installed."""
    one = CONTENDERS[contender]
    if not one.installed:
        return None
    return "" if one.library is None else importlib.metadata.version(one.library)


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Say in a line what a cell came to."""
    return ", ".join(f"{row['contender']} {min(row['seconds']):.2f} s" for row in rows if row["seconds"])


EXPERIMENT = Experiment(
    name="peers-accuracy",
    summary="the time that each library needs for hypergradients within a tolerance, along a hyper-cleaning run",
    source="betty-ml, higher, torchopt, boat-torch and jax as pip installs them; Ramzi et al. 2022 (SHINE)",
    datasets=("digits",),
    presets=PRESETS,
    methods=tuple(CONTENDERS),
    run=run,
)
