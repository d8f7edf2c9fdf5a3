"""Running the benchmark: a cell for each workload and hypergradient, the tables, the figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from funcmlo.errors import DefinitionError
from paper_repro.experiment import Experiment, Request, swept, varied
from paper_repro.peers.cell import cell
from paper_repro.peers.contenders import CONTENDERS
from paper_repro.peers.figure import draw_figure
from paper_repro.peers.ratios import groups
from paper_repro.peers.report import line, summary
from paper_repro.peers.served import surroundings
from paper_repro.peers.settings import Settings
from paper_repro.peers.workloads import ESTIMATORS, WORKLOADS
from paper_repro.results import environment, write_json

PRESETS: dict[str, Settings] = {"smoke": Settings(sizes="smoke", rounds=2, threads=1), "cpu": Settings()}


def run(request: Request) -> Sequence[Path]:
    """Run a request: print the tables, write `results.json`, `table.txt` and the figure.

    Args:
        request: what the user asked for; its methods are contenders.

    Returns:
        The paths written.

    Raises:
        DefinitionError: cells were to run side by side, where none would have the machine to itself; or no hypergradient
            is asked for.
    """
    if request.jobs > 1 or request.dask:
        raise DefinitionError("--jobs or --dask came; expected neither: what is timed needs the machine to itself.")
    settings = replace(PRESETS[request.preset], contenders=request.methods)
    names = list(WORKLOADS) if request.dataset == "all" else [request.dataset]
    wanted = {name for chosen in varied(settings, request.changes).values() for name in chosen.estimators}
    pairs = [f"{name} {estimator}" for name in names for estimator in WORKLOADS[name].estimators if estimator in wanted]
    if not pairs:
        raise DefinitionError(
            f"No hypergradient of {request.dataset} is left by {dict(request.changes)}; expected one of "
            f"{', '.join(ESTIMATORS)} to be True (of tasks itd)."
        )
    versions = {name: CONTENDERS[name].version() for name in request.methods}
    for name in request.methods:
        if not CONTENDERS[name].installed():
            print(f"{name}: skipped, {CONTENDERS[name].module} is not installed")
    written: list[Path] = []
    for found in swept(
        request,
        "peers",
        settings,
        cell,
        pairs,
        header=lambda s: (
            f"hypergradients ({len(pairs)}) by {', '.join(request.methods)}; {s.rounds} rounds, {s.threads} "
            f"thread{'s' if s.threads > 1 else ''}"
        ),
        line=line,
    ):
        measured = groups([row for row in found.rows if row is not None])
        text = summary(measured, found.settings.sizes)
        print(f"\n{found.title}\n\n{text}" if found.title else f"\n{text}")
        content = {
            "experiment": "peers",
            "dataset": request.dataset,
            "preset": request.preset,
            "settings": asdict(found.settings),
            "seeds": list(range(request.seeds)),
            "versions": versions,
            "environment": environment(),
            "surroundings": surroundings(found.settings.threads),  # of the processes that were measured
            "groups": [asdict(group) for group in measured],
            "rows": found.rows,
        }
        results = write_json(found.out / "results.json", content)
        (found.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        written += [results, found.out / "table.txt", draw_figure(found.out / "figure.png", measured)]
    return written


EXPERIMENT = Experiment(
    name="peers",
    summary="time, memory and error of hypergradients by this library and by every peer, in one run",
    source="by hand, betty-ml, higher, torchopt and boat-torch as pip installs them, and JAX under jit",
    datasets=("all", *WORKLOADS),
    presets=PRESETS,
    methods=tuple(CONTENDERS),
    run=run,
)
