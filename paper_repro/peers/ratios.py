"""From turns to numbers: medians, and ratios to the fastest and to the cost model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paper_repro.peers.contenders import CONTENDERS

REMAKES = frozenset({"recompute", "mixed", "checkpoint"})
"""The variants that keep parameters in place of graphs; their memory is compared among themselves."""

LEAST = 1e6
"""The bytes below which a peak is no measure: pages, and code that is loaded when it is first needed."""


@dataclass(frozen=True)
class Line:
    """What one contender did.

    Attributes:
        contender: its name.
        seconds: the median wall seconds of a hypergradient.
        processor: the median processor seconds.
        to_peer: seconds over those of the fastest torch peer.
        to_all: seconds over those of the fastest of all.
        to_model: seconds over the cost model's.
        first: seconds of the first call beyond another one: compiling, mostly.
        error: ‖answer − reference‖ / ‖reference‖; None if the answer is not finite.
        peak: bytes above the start; None if not measured.
        to_peak: peak over the least of the torch peers that keep the same (graphs, or parameters); None without one of at
            least `LEAST`.
    """

    contender: str
    seconds: float
    processor: float
    to_peer: float | None
    to_all: float
    to_model: float
    first: float
    error: float | None
    peak: float | None
    to_peak: float | None


@dataclass(frozen=True)
class Group:
    """One hypergradient of one workload.

    Attributes:
        workload: its name.
        estimator: the hypergradient's.
        model: the cost model's seconds.
        lines: of the contenders, in their order.
        skipped: why others were not measured, by name.
    """

    workload: str
    estimator: str
    model: float
    lines: list[Line]
    skipped: dict[str, str]


def groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return what cells came to, in their order; several seeds of a cell are one.

    Args:
        rows: what `cell` returned.

    Returns:
        One for each workload and estimator.
    """
    gathered: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        gathered.setdefault((row["workload"], row["estimator"]), []).append(row)
    return [_group(*key, several) for key, several in gathered.items()]


def _group(workload: str, estimator: str, rows: Sequence[Mapping[str, Any]]) -> Group:
    outcomes = {who: [row["outcomes"][who] for row in rows] for who in rows[0]["outcomes"]}
    skipped = {
        who: next(o["skipped"] for o in several if "skipped" in o) for who, several in outcomes.items() if _lacks(several)
    }
    model = statistics.median(row["model"] for row in rows)
    done = {who: several for who, several in outcomes.items() if who not in skipped}
    seconds = {who: statistics.median(t for o in several for t in o["walls"]) for who, several in done.items()}
    peaks = {who: _median([o.get("peak") for o in several]) for who, several in done.items()}

    peers = [who for who in done if CONTENDERS[who].kind == "peer"]
    fastest = min((seconds[who] for who in peers), default=None)

    lines = []
    for who, several in done.items():
        alike = [other for other in peers if remakes(other) == remakes(who)]
        least = min((peak for other in alike if (peak := peaks[other]) is not None), default=None)
        errors = [o["error"] for o in several]
        lines.append(
            Line(
                contender=who,
                seconds=seconds[who],
                processor=statistics.median(t for o in several for t in o["processors"]),
                to_peer=_ratio(seconds[who], fastest),
                to_all=seconds[who] / min(seconds.values()),
                to_model=seconds[who] / model,
                first=statistics.median(o["first"] for o in several) - seconds[who],
                error=None if None in errors else max(errors),
                peak=peaks[who],
                to_peak=_ratio(peaks[who], least) if least and least >= LEAST else None,
            )
        )
    return Group(workload, estimator, model, lines, skipped)


def remakes(contender: str) -> bool:
    """Return whether a contender keeps parameters in place of graphs."""
    return CONTENDERS[contender].variant in REMAKES


def _lacks(outcomes: Sequence[Mapping[str, Any]]) -> bool:
    return any("skipped" in outcome for outcome in outcomes)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b
