"""The table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from paper_repro.peers_accuracy.contenders import CONTENDERS
from paper_repro.peers_accuracy.course import Settings
from paper_repro.results import table


def summary(outcomes: Sequence[Any], settings: Settings) -> str:
    """Write a row for each contender, seed by seed, with its notes.

    Args:
        outcomes: what the contenders did.
        settings: the rules.

    Returns:
        The text.
    """
    header = ("contender", "inner", "steps", "solve", "seconds", "processor", "ratio", "largest error", "median error")
    parts = []
    seeds = sorted({outcome.seed for outcome in outcomes})
    for seed in seeds:
        mine = [outcome for outcome in outcomes if outcome.seed == seed]
        fastest = fastest_peer(mine)
        rows = [_row(outcome, fastest, settings) for outcome in mine]
        parts.append((f"seed {seed}\n" if len(seeds) > 1 else "") + table(header, rows))
        parts[-1] += "".join(f"\n{o.contender}: {o.why}." for o in mine if o.why)
    notes = [
        f"Each row: {settings.outer} hypergradients, those from outer step {settings.free} on within {settings.tolerance:g} "
        "of the truth, with the cheapest knobs of the grid that do.",
        f"steps: inner steps for each outer step ({settings.begin} times as many in the first one, which starts from zero).",
        "solve: products, terms of the series, or the tolerance of the linear solve.",
        f"seconds, processor: of the whole course, the median of {settings.repeats} runs in turn, each in a fresh process.",
        "ratio: of processor seconds to those of the fastest torch peer (by-hand is one; by-hand-lbfgs, jax-jit and "
        "this library's rows are none).",
    ]
    return "\n\n".join(parts) + "\n\n" + "\n".join(notes)


def fastest_peer(outcomes: Sequence[Any]) -> float | None:
    """Return the processor seconds of the fastest torch peer; None if there is none."""
    times = [
        statistics.median(outcome.processor)
        for outcome in outcomes
        if outcome.processor and CONTENDERS[outcome.contender].counted
    ]
    return min(times, default=None)


def _row(outcome: Any, fastest: float | None, settings: Settings) -> list[str]:
    contender = CONTENDERS[outcome.contender]
    if not outcome.seconds:
        return [outcome.contender, contender.inner, *"–––––––"]
    seconds, processor = statistics.median(outcome.seconds), statistics.median(outcome.processor)
    held = outcome.errors[settings.free :]
    return [
        outcome.contender,
        contender.inner,
        f"{outcome.knobs['steps']}",
        "–" if contender.linear == "none" else f"{outcome.knobs['linear']:g}",
        f"{seconds:.2f}",
        f"{processor:.2f}",
        "–" if fastest is None else f"{processor / fastest:.2f}",
        f"{max(held):.1e}",
        f"{statistics.median(held):.1e}",
    ]
