"""The tables: one for each workload, and who was not measured, by name and with the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paper_repro.peers.ratios import Group
from paper_repro.peers.workloads import WORKLOADS
from paper_repro.results import table

HEADER = (
    "method, contender", "ms", "cpu ms", "/ torch peer", "/ fastest", "/ model", "first s", "peak MB", "/ least", "error",
)  # fmt: skip

NOTES = """\
ms: median wall time of a hypergradient; cpu ms: processor time of all threads. / torch peer: to the fastest of by-hand,
betty, higher, torchopt and boat; / fastest: to the fastest of all; / model: to the sum of the gradients and products that it
needs, measured by hand in the same run. first s: the first call less another one, mostly compiling. peak MB: above the
start, in processes of their own; / least: to the least torch peer that keeps the same (graphs, or parameters and no graphs).
error: relative, of the float32 answer against the same method by hand in float64 (a difference: against what it
approximates)."""


def summary(groups: Sequence[Group], sizes: str) -> str:
    """Write the tables.

    Args:
        groups: what was measured.
        sizes: of the workloads, "cpu" or "smoke".

    Returns:
        The text.
    """
    blocks = []
    for name in dict.fromkeys(group.workload for group in groups):
        mine = [group for group in groups if group.workload == name]
        rows = [row for group in mine for row in _rows(group)]
        title = f"{name}{' (tiny)' if sizes == 'smoke' else ''}: {WORKLOADS[name].summary}"
        blocks.append("\n".join([title, table(HEADER, rows), *_skipped(mine)]))
    return "\n\n".join([*blocks, NOTES])


def _rows(group: Group) -> list[list[str]]:
    model = [f"{group.estimator}: the cost model", _number(1e3 * group.model), *["–"] * (len(HEADER) - 2)]
    rows = [
        [
            f"  {line.contender}",
            _number(1e3 * line.seconds),
            _number(1e3 * line.processor),
            _number(line.to_peer),
            _number(line.to_all),
            _number(line.to_model),
            f"{max(line.first, 0):.1f}",
            _number(None if line.peak is None else line.peak / 1e6),
            _number(line.to_peak),
            "not finite" if line.error is None else f"{line.error:.0e}",
        ]
        for line in group.lines
    ]
    return [model, *rows]


def _skipped(groups: Sequence[Group]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for who, why in group.skipped.items():
            reasons.setdefault((who, why), []).append(group.estimator)
    return [f"not measured: {who} ({', '.join(estimators)}): {why}" for (who, why), estimators in reasons.items()]


def _number(value: float | None) -> str:
    """Write three digits, so that columns can be compared."""
    if value is None:
        return "–"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def line(row: Mapping[str, Any] | None) -> str:
    """Say in a line how many were measured and how many were not."""
    if row is None:
        return "left out"
    outcomes = row["outcomes"]
    skipped = sum("skipped" in outcome for outcome in outcomes.values())
    return f"{len(outcomes) - skipped} measured, {skipped} not"
