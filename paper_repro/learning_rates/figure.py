"""The figure: the validation loss against the rate with the learned path, the runs' curves, and the rates by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

from paper_repro.data import Dataset
from paper_repro.results import FIGURE_STYLE

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind; dashes tell the lines apart in black and white.
COLOURS = {
    "one-rate": "#0072B2",
    "rate-and-momentum": "#E69F00",
    "per-layer": "#009E73",
    "per-step": "#D55E00",
    "per-parameter": "#CC79A7",
    "momentum-from-below": "#56B4E9",
}
DASHES = {
    "one-rate": "-",
    "rate-and-momentum": (0, (5, 1)),
    "per-layer": "--",
    "per-step": "-.",
    "per-parameter": ":",
    "momentum-from-below": (0, (1, 1)),
}


def draw_figure(path: Path, data: Dataset, outcomes: Sequence[Any]) -> Path:
    """Draw the first seed's path, and the means over all seeds.

    Args:
        path: the PNG to write.
        data: the data set.
        outcomes: the searches and the methods.

    Returns:
        The path.
    """
    by_name = {name: [o for o in outcomes if o.method == name] for name in dict.fromkeys(o.method for o in outcomes)}
    seeds = len(by_name["grid"])
    with plt.rc_context(FIGURE_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1.25, 1), layout="constrained")
        _path(left, {name: mine[0] for name, mine in by_name.items()})
        _curves(right, by_name)
        figure.suptitle(f"Learning rates learned on {data.name}", fontweight="bold")
        right.set_title(f"median and range over {seeds} seeds" if seeds > 1 else "seed 0")
        figure.savefig(path)
        plt.close(figure)
    return path


def _path(axes: Any, first: dict[str, Any]) -> None:
    """The validation loss as a function of one rate, the grid's points on it, and where the learned rate went."""
    fine, grid = first["fine"], first["grid"]
    axes.loglog(*zip(*fine.path, strict=True), color="0.65", lw=1.5, zorder=1, label=f"{len(fine.path)} rates")
    axes.loglog(
        *zip(*grid.path, strict=True), "o", color="white", mec="0.3", ms=9, zorder=2, label=f"grid of {len(grid.path)}"
    )
    axes.loglog([grid.rate], [grid.valid], "*", color="#E69F00", mec="0.3", ms=17, zorder=3, label="the grid's best")
    if "one-rate" in first:
        rate, loss = zip(*first["one-rate"].path, strict=True)
        axes.loglog(rate, loss, "-", color=COLOURS["one-rate"], lw=1.2, marker="o", ms=4, zorder=4, label="one learned run")
        axes.annotate("start", (rate[0], loss[0]), xytext=(-3, 9), textcoords="offset points", color=COLOURS["one-rate"])
        _closer(axes, first)
    axes.set(xlabel="learning rate (of the first step)", ylabel="validation loss after training, nats", title="seed 0")
    axes.legend(frameon=False, loc="lower left")


def _closer(axes: Any, first: dict[str, Any]) -> None:
    """The surroundings of the minimum, enlarged."""
    rate, loss = first["one-rate"].path[first["one-rate"].best]
    inset = axes.inset_axes((0.09, 0.54, 0.5, 0.43))
    for path, style in (
        (first["fine"].path, {"color": "0.65", "lw": 1.5}),
        (first["grid"].path, {"ls": "", "marker": "o", "color": "white", "mec": "0.3", "ms": 9}),
        ([(first["grid"].rate, first["grid"].valid)], {"ls": "", "marker": "*", "color": "#E69F00", "mec": "0.3", "ms": 15}),
        (first["one-rate"].path, {"color": COLOURS["one-rate"], "lw": 1.0, "marker": "o", "ms": 3.5}),
        ([(rate, loss)], {"color": COLOURS["one-rate"], "marker": "D", "ms": 6}),
    ):
        inset.plot(*zip(*path, strict=True), **style)
    worst = max((v for r, v in first["fine"].path if rate / 2.2 <= r <= rate * 2.2), default=2 * loss)
    low, span = min(loss, first["grid"].valid), worst - min(loss, first["grid"].valid)
    inset.set(xscale="log", xlim=(rate / 2.2, rate * 2.2), ylim=(low - 0.12 * span, low + 1.05 * span))
    ticks = [tick for tick in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0) if rate / 2.2 <= tick <= rate * 2.2]
    inset.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    inset.set_xticks([], minor=True)
    inset.tick_params(labelsize=8)
    axes.indicate_inset_zoom(inset, edgecolor="0.6")


def _curves(axes: Any, by_name: dict[str, list[Any]]) -> None:
    """Each method's validation loss less that of the same seed's best of the grid."""
    best = torch.tensor([o.valid for o in by_name["grid"]], dtype=torch.float64)
    lowest = 0.0
    for name, mine in by_name.items():
        if name not in COLOURS:  # a search, or a run that never leaves where training diverges
            continue
        curves = torch.tensor([o.curve for o in mine], dtype=torch.float64) - best[:, None]
        updates = list(range(curves.shape[1]))
        axes.plot(updates, curves.median(dim=0).values.tolist(), ls=DASHES[name], color=COLOURS[name], lw=2, label=name)
        if len(mine) > 1:
            ends = curves.min(dim=0).values.tolist(), curves.max(dim=0).values.tolist()
            axes.fill_between(updates, *ends, color=COLOURS[name], alpha=0.12, lw=0)
        lowest = min(lowest, float(curves.min()))
    axes.axhline(0, color="0.3", lw=1, zorder=0)
    axes.set_yscale("symlog", linthresh=0.02)
    axes.set(
        xlabel="updates of the hyperparameters", ylabel="validation loss − best of the grid", ylim=(1.6 * lowest - 0.01, 3)
    )
    ticks = [tick for tick in (-0.1, -0.02, -0.01, 0, 0.01, 0.02, 0.1, 1) if tick > 1.6 * lowest - 0.01]
    axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlim(0, math.ceil(len(by_name) and max(len(o.curve) for mine in by_name.values() for o in mine) - 1))
    axes.legend(frameon=False, loc="lower left", fontsize=9, handlelength=2.6)
