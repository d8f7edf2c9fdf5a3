"""A figure of errors against costs that reads in black and white: markers tell what is aimed at, names stand beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from funcmlo.comparing.measuring import Row
from funcmlo.comparing.reference import Reference
from funcmlo.errors import EstimatorError
from funcmlo.layout import spread
from funcmlo.table import shortened

_AXES = {
    "seconds": "seconds beyond the inner loops",
    "hvps": "Hessian-vector products",
    "gradients": "gradients of the lower cost",
    "steps": "inner steps differentiated or made again",
    "memory": "peak memory of the call (bytes)",
}
_MARKERS = {
    "unrolled": ("s", "the inner run's derivative"),
    "implicit": ("o", "the implicit hypergradient"),
    "identity": ("^", "the identity for the inverse Hessian"),
    "step": ("D", "one step's derivative"),
}
_SMALLEST = 1e-17  # a float64's error of zero has to stand somewhere
_SIZE = 9.0


def draw(rows: Sequence[Row], reference: Reference, cost: str, axes: Any = None) -> Any:
    """Draw a point for each estimator that has an answer.

    Args:
        rows: the comparison's.
        reference: what their errors are against.
        cost: the field of a row that is the abscissa.
        axes: matplotlib's axes; None for a new figure.

    Returns:
        The axes.

    Raises:
        EstimatorError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise EstimatorError("plot needs matplotlib, which is not installed: pip install matplotlib.") from None
    points = [(row, x, row.error) for row in rows if (x := abscissa(row, cost)) is not None and row.error is not None]
    points = [(row, x, y) for row, x, y in points if math.isfinite(y)]
    if not points:
        raise EstimatorError(f"no estimator has an error and {cost} to draw; print the comparison for the reasons.")
    if axes is None:
        _, axes = plt.subplots(figsize=(7.5, 5), dpi=150, layout="constrained")
    own, moves = reference.error or 0.0, reference.moves or 0.0
    least = max(min([y for *_, y in points if y > 0], default=1.0), _SMALLEST)
    floor = least if all(y > 0 for *_, y in points) else max(min(least, own or least) / 3, _SMALLEST)
    targets = dict.fromkeys(row.estimator.claims.target for row, *_ in points)
    for target in (t for t in _MARKERS if t in targets):
        marker, label = _MARKERS[target]
        for stochastic in (False, True):
            group = [(x, max(y, floor)) for row, x, y in points if _kind(row) == (target, stochastic)]
            if group:
                fill = "white" if stochastic else "0.15"
                name = f"{label}, drawn" if stochastic else label
                axes.plot(*zip(*group, strict=True), marker, mfc=fill, mec="0.15", ms=6.5, ls="", label=name, zorder=3)
    if any(x == 0 for _, x, _ in points):
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
        axes.set_xlim(-0.4, 3 * max(1.0, *(x for _, x, _ in points)))
    else:
        axes.set_xscale("log")
        lowest, highest = min(x for _, x, _ in points), max(x for _, x, _ in points)
        room = max((highest / lowest) ** 0.25, 1.5)
        axes.set_xlim(lowest / room, highest * room)
    axes.set_yscale("log")
    heights = [max(y, floor) for *_, y in points] + ([moves] if moves else [])
    room = max((max(heights) / min(heights)) ** 0.12, 1.5)
    axes.set_ylim(min(heights) / room, max(heights) * room)
    bottom, top = axes.get_ylim()
    if own > bottom:
        axes.axhspan(bottom, min(own, top), facecolor="none", edgecolor="0.8", hatch="//", lw=0, zorder=0)
        _aside(axes, min(own, top), "the reference's own error", below=True)
    if moves > bottom:
        axes.axhline(moves, color="0.45", lw=1, ls="--", zorder=1)
        _aside(axes, moves, "the reference's move with as many inner steps again", below=False)
    axes.set_xlabel(_AXES[cost])
    axes.set_ylabel("relative error of the hypergradient")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="0.92", lw=0.8, zorder=-1)
    axes.legend(frameon=False, fontsize=_SIZE, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.3)
    _names(axes, [(shortened(row.name, 40), x, max(y, floor)) for row, x, y in points])
    return axes


def abscissa(row: Row, cost: str) -> float | None:
    """Return what a row costs, as a number for an axis; None where that is not known.

    Args:
        row: the row.
        cost: the field; for `"steps"` those that were made again are counted too.

    Returns:
        The number.
    """
    value = getattr(row, cost)
    if value is None:
        return None
    return float(value + (row.replayed or 0)) if cost == "steps" else float(value)


def _kind(row: Row) -> tuple[str, bool]:
    return row.estimator.claims.target, row.estimator.claims.stochastic


def _aside(axes: Any, y: float, words: str, *, below: bool) -> None:
    """Words at a horizontal line, at its left end."""
    axes.annotate(
        words,
        (0.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(3, -3 if below else 3),
        textcoords="offset points",
        ha="left",
        va="top" if below else "bottom",
        fontsize=_SIZE - 1,
        color="0.35",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
        zorder=5,
    )


def _names(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name beside its point; where there is no room for all of them, in a column at the right."""
    figure = axes.figure
    figure.canvas.draw()  # settles the layout
    frame = _box(axes.get_window_extent())
    unit = figure.dpi / 72
    spots = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [(x - 4 * unit, y - 4 * unit, x + 4 * unit, y + 4 * unit) for x, y in spots]
    taken += [_box(text.get_window_extent()) for text in axes.texts]
    written = []
    for (name, x, y), _ in sorted(zip(points, spots, strict=True), key=lambda pair: -pair[1][1]):
        for dx, dy, ha in _PLACES:
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=ha, va="center", fontsize=_SIZE)
            box = _box(text.get_window_extent())
            if all(_overlap(box, other) == 0 for other in taken) and _overlap(box, frame) > 0.99 * _area(box):
                written.append(text)
                taken.append(box)
                break
            text.remove()
        else:
            break
    if len(written) == len(points):
        return
    for text in written:
        text.remove()
    order = sorted(range(len(points)), key=lambda i: (spots[i][1], spots[i][0]))
    line = 1.4 * _SIZE * unit
    places = spread([spots[i][1] for i in order], [1.0] * len(order), [line] * (len(order) - 1))
    overshoot = max(0.0, places[-1] - frame[3]) - max(0.0, frame[1] - places[0])
    for i, place in zip(order, places, strict=True):
        name, x, y = points[i]
        axes.annotate(
            name,
            (x, y),
            (1.04, (place - overshoot - frame[1]) / (frame[3] - frame[1])),
            textcoords="axes fraction",
            ha="left",
            va="center",
            fontsize=_SIZE,
            arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.6, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)},
        )


_PLACES = [(8, 0, "left"), (-8, 0, "right"), (6, 10, "left"), (6, -10, "left"), (-6, 10, "right"), (-6, -10, "right")]

Box = tuple[float, float, float, float]


def _box(extent: Any) -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _area(a: Box) -> float:
    return max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])


def _overlap(a: Box, b: Box) -> float:
    return _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
