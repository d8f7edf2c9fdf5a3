"""The tables: who is right on what, and every error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from paper_repro.peers_correctness.judge import Outcome
from paper_repro.peers_correctness.problem import Question
from paper_repro.results import table

ORDER = ("wrong", "error", "right to its approximation", "right", "not offered", "not asked", "not installed")
"""Of several seeds' verdicts the first of these counts."""


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the outcome that counts among those of several seeds: the worst verdict, then the largest error."""
    return min(outcomes, key=lambda o: (ORDER.index(o.verdict), -(o.error or 0.0)))


def cell(outcome: Outcome) -> str:
    """Write one outcome: the error, «~» before an approximation's, «!» after a wrong one."""
    if outcome.verdict == "error":
        return "ERROR"
    if outcome.verdict in {"not asked", "not offered", "not installed"}:
        return {"not asked": "–", "not offered": "n/o"}.get(outcome.verdict, "absent")
    mark = {"wrong": ("", "!"), "right": ("", ""), "right to its approximation": ("~", "")}[outcome.verdict]
    if outcome.error is None:
        said = outcome.message or ""
        text = said if said in {"finite", "not finite"} else "raised"
    elif math.isinf(outcome.error):
        text = outcome.message or "inf"
    else:
        text = f"{outcome.error:.0e}"
    return f"{mark[0]}{text}{mark[1]}"


def summary(outcomes: Sequence[Outcome], versions: Mapping[str, str | None]) -> str:
    """Write one line for each method: how many questions it has right, and which it has wrong.

    Args:
        outcomes: of all peers and seeds.
        versions: by peer; None where it is not installed, "" for code of this folder.

    Returns:
        The table.
    """
    rows = []
    for (peer, method), mine in _grouped(outcomes).items():
        name = f"{peer} {versions.get(peer) or ''}".strip()
        asked = [o for o in mine.values() if o.verdict not in {"not asked", "not offered"}]
        if method == "–":
            rows.append([name, "–", "–", "–", asked[0].message or asked[0].verdict])
            continue
        right = [o for o in asked if o.verdict.startswith("right")]
        wrong = [f"{o.question} ({cell(o).rstrip('!')})" for o in asked if not o.verdict.startswith("right")]
        said = "all: ERROR" if all(o.verdict == "error" for o in asked) else ", ".join(wrong) or "–"
        rows.append([name, method, asked[0].target, f"{len(right)} of {len(asked)}", said])
    return _left([("library", "method", "compared with", "right", "not right (relative error)"), *rows])


def details(outcomes: Sequence[Outcome], questions: Sequence[Question]) -> str:
    """Write every library's errors: a line for each question, a column for each method."""
    grouped = _grouped(outcomes)
    blocks = []
    for peer in dict.fromkeys(peer for peer, method in grouped if method != "–"):
        columns = {method: cells for (of, method), cells in grouped.items() if of == peer}
        rows = [[q.name, *(cell(cells[q.name]) for cells in columns.values())] for q in questions]
        blocks.append(f"{peer}\n{table(('question', *columns), rows)}")
    return "\n\n".join(blocks)


def notes(outcomes: Sequence[Outcome], questions: Sequence[Question]) -> str:
    """Write what the marks and the questions mean, and the exceptions."""
    seeds = len({o.seed for o in outcomes})
    lines = [
        "Relative error against the answer in float64, the worst of the seeds. !: wrong. ~: right to the approximation that",
        "the method documents (H⁻¹ = I, or one step), within 1e-2. –: not asked. n/o: not offered. raised: an exception,",
        "which is right on the NaN questions. ERROR: an exception elsewhere.",
        f"{seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        *(f"{q.name}: shows {q.seen}; tolerance {q.tolerance:.0e}." for q in questions),
    ]
    failed = {f"{o.peer}, {o.method}: {o.message}" for o in outcomes if o.verdict == "error"}
    return "\n".join(lines + (["", *sorted(failed)] if failed else []))


def _left(rows: Sequence[Sequence[str]]) -> str:
    """Align words to the left, but the last column, which is as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    rows = [rows[0], ["-" * width for width in [*widths, len(rows[0][-1])]], *rows[1:]]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def _grouped(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], dict[str, Outcome]]:
    """Return the worst outcome by (peer, method) and question, in the order in which they came."""
    gathered: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        gathered.setdefault((outcome.peer, outcome.method), {}).setdefault(outcome.question, []).append(outcome)
    return {key: {name: worst(several) for name, several in cells.items()} for key, cells in gathered.items()}
