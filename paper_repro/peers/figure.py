"""The figure: how long each contender takes beside the fastest torch peer, for each workload and method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from paper_repro.peers.contenders import CONTENDERS
from paper_repro.peers.ratios import REMAKES, Group
from paper_repro.results import FIGURE_STYLE

mpl.use("Agg")
from matplotlib import pyplot as plt

# Fill and hatch tell the bars apart in black and white.
STYLES: dict[str, tuple[str, str]] = {
    "by-hand": ("white", ""),
    "by-hand-vmap": ("white", "..."),
    "betty": ("white", "///"),
    "higher": ("white", "\\\\\\"),
    "torchopt": ("white", "xxx"),
    "boat": ("white", "---"),
    "jax": ("white", "ooo"),
    "funcmlo": ("0.65", ""),
    "funcmlo-compiled": ("0.35", ""),
    "funcmlo-whole": ("black", ""),
}
NAMES = {"itd": "ITD", "cg": "CG", "neumann": "Neumann", "difference": "difference"}


def draw_figure(path: Path, groups: Sequence[Group]) -> Path:
    """Draw the ratios as bars; the modes that save memory are in the tables alone.

    Args:
        path: the PNG to write.
        groups: what was measured.

    Returns:
        The path.
    """
    names = list(dict.fromkeys(group.workload for group in groups))
    columns = min(3, len(names))
    with plt.rc_context(FIGURE_STYLE):
        height = -(-len(names) // columns)
        figure, grid = plt.subplots(
            height, columns, figsize=(4.6 * columns + 0.6, 3.6 * height + 0.9), layout="constrained", squeeze=False
        )
        for axes, name in zip(grid.flat, names, strict=False):
            _bars(axes, [group for group in groups if group.workload == name])
            axes.set_title(name)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_axis_off()
        for row in grid:
            row[0].set_ylabel("time / fastest torch peer's")
        handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        handles = {name: handles[name] for name in STYLES if name in handles}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(3 * columns, 5), frameon=False)
        figure.savefig(path)
        plt.close(figure)
    return path


def _bars(axes: Any, groups: Sequence[Group]) -> None:
    """One group of bars for each method, on a logarithmic axis about 1."""
    shown = [who for who in STYLES if any(line.contender == who for group in groups for line in group.lines)]
    assert all(who in CONTENDERS and CONTENDERS[who].variant not in REMAKES for who in shown)
    width = 0.85 / len(shown)
    for i, who in enumerate(shown):
        colour, hatch = STYLES[who]
        found = [
            (place + (i - (len(shown) - 1) / 2) * width, line.to_peer)
            for place, group in enumerate(groups)
            for line in group.lines
            if line.contender == who and line.to_peer is not None
        ]
        places, heights = zip(*found, strict=True)
        # From 1 up or down, so that a bar's length is what was lost or gained.
        axes.bar(
            places,
            [h - 1 for h in heights],
            width,
            bottom=1,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            lw=0.7,
            label=who,
        )
        axes.plot(places, heights, ".", color="black", ms=4)  # where a bar ends, of those at 1 too
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))
    axes.axhline(1, color="black", lw=0.8)
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xticks(range(len(groups)), [NAMES[group.estimator] for group in groups])
    axes.tick_params(axis="x", length=0)
