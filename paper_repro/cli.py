"""The command line: `python -m paper_repro list` and `python -m paper_repro run NAME …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from funcmlo.errors import FuncmloError
from paper_repro.data import DataError
from paper_repro.domains import EXPERIMENT as DOMAINS
from paper_repro.experiment import Experiment, Request
from paper_repro.hypercleaning import EXPERIMENT as HYPERCLEANING
from paper_repro.learning_rates import EXPERIMENT as LEARNING_RATES
from paper_repro.peers.run import EXPERIMENT as PEERS
from paper_repro.peers_accuracy import EXPERIMENT as PEERS_ACCURACY
from paper_repro.peers_correctness import EXPERIMENT as PEERS_CORRECTNESS

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (HYPERCLEANING, DOMAINS, LEARNING_RATES, PEERS_CORRECTNESS, PEERS, PEERS_ACCURACY)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; None takes them from the process.

    Returns:
        The exit status: 0, 1 when data, a program or a cell failed, 130 when it was interrupted, and 2 (by SystemExit) for
        words that mean nothing.
    """
    chosen = _parser().parse_args(arguments)
    if chosen.command == "list":
        print(_listing())
        return 0
    experiment = EXPERIMENTS[chosen.name]
    request = Request(
        dataset=chosen.dataset or experiment.datasets[0],
        preset=chosen.preset,
        methods=tuple(dict.fromkeys(chosen.methods or experiment.methods)),
        seeds=chosen.seeds,
        out=chosen.out or Path("results") / experiment.name / chosen.preset,
        data_dir=chosen.data_dir,
        jobs=chosen.jobs,
        dask=chosen.dask,
        fresh=chosen.fresh,
        changes=dict(chosen.set),
    )
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        written = experiment.run(request)
    except (DataError, FuncmloError, OSError) as error:
        print(f"{experiment.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = request.out / "cells"
        print(f"{experiment.name}: interrupted; finished cells are in {kept}: the same command goes on", file=sys.stderr)
        return 130
    print("\nwritten: " + ", ".join(str(path) for path in written))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m paper_repro", description="Rerun the papers' benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say what can be run")
    run = commands.add_parser("run", help="run one experiment")
    names = run.add_subparsers(dest="name", required=True, metavar="NAME")
    for experiment in EXPERIMENTS.values():
        one = names.add_parser(
            experiment.name, help=experiment.summary, description=f"{experiment.summary}. {experiment.source}"
        )
        one.add_argument("--dataset", choices=experiment.datasets, help=f"default: {experiment.datasets[0]}")
        one.add_argument("--preset", choices=list(experiment.presets), default="cpu", help="default: cpu")
        one.add_argument(
            "--methods", nargs="+", choices=experiment.methods, metavar="METHOD", help=", ".join(experiment.methods)
        )
        one.add_argument("--seeds", type=_positive, default=1, metavar="N", help="how many seeds, from 0; default: 1")
        one.add_argument(
            "--set",
            nargs="+",
            type=_change,
            default=[],
            metavar="SETTING=VALUE[,VALUE…]",
            help="change the preset's settings",
        )
        where = one.add_mutually_exclusive_group()
        where.add_argument("--jobs", type=_positive, default=1, metavar="N", help="cells that run at a time; default: 1")
        where.add_argument("--dask", metavar="HOST:PORT", help="run the cells on this Dask scheduler's workers")
        one.add_argument("--fresh", action="store_true", help="run the cells again that are finished in DIR/cells")
        one.add_argument("--out", type=Path, metavar="DIR", help="default: results/NAME/PRESET")
        one.add_argument("--data-dir", type=_folder, metavar="DIR", help="where data sets are looked for first")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} came; expected an integer of at least 1")
    return int(text)


def _change(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, values = text.partition("=")
    if not (name and equals and all(values.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} came; expected a setting and its values, such as inner=10,20")
    return name, tuple(values.split(","))


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


def _listing() -> str:
    lines = []
    for experiment in EXPERIMENTS.values():
        lines += [
            f"{experiment.name}: {experiment.summary}",
            f"  source:   {experiment.source}",
            f"  datasets: {', '.join(experiment.datasets)}",
            f"  presets:  {', '.join(experiment.presets)}",
            f"  methods:  {', '.join(experiment.methods)}",
        ]
    return "\n".join(lines)
