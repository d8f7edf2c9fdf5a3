"""What an experiment is to the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the user asked for on the command line.

    Attributes:
        dataset: one of the experiment's data sets.
        preset: one of the experiment's presets.
        methods: some of the experiment's methods, in order.
        seeds: how many seeds, counted from 0.
        out: the folder that results go to; it exists.
        data_dir: where data sets are looked for first; None for the usual places.
    """

    dataset: str
    preset: str
    methods: tuple[str, ...]
    seeds: int
    out: Path
    data_dir: Path | None = None


@dataclass(frozen=True)
class Experiment:
    """A benchmark that the command line can run.

    Attributes:
        name: its name on the command line.
        summary: one line for `list`.
        source: the papers it reproduces.
        datasets: names for `--dataset`, the default first.
        presets: settings by name for `--preset`.
        methods: names for `--methods`.
        run: runs a request, prints its table, writes into the request's folder, and returns the paths written.
    """

    name: str
    summary: str
    source: str
    datasets: Sequence[str]
    presets: Mapping[str, Any]
    methods: Sequence[str]
    run: Callable[[Request], Sequence[Path]]
