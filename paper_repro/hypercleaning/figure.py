"""The figure: accuracy over steps, the learned weights, and the labels that were found to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from einops import rearrange

from paper_repro.data import Dataset
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.results import FIGURE_STYLE

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind; dashes tell the lines apart in black and white.
COLOURS = {"itd": "#0072B2", "cg": "#D55E00", "neumann": "#009E73", "finite-difference": "#CC79A7"}
DASHES = {"itd": "-", "cg": "--", "neumann": "-.", "finite-difference": ":"}
SHOWN = 16


def draw_figure(path: Path, data: Dataset, problem: Cleaning, outcomes: Sequence[Any]) -> Path:
    """Draw one seed's outcomes.

    Args:
        path: the PNG to write.
        data: the data set.
        problem: the draw that the outcomes are of.
        outcomes: baselines and methods.

    Returns:
        The path.
    """
    methods = [o for o in outcomes if o.weights is not None]
    best = max(methods, key=lambda o: o.auc)
    with plt.rc_context(FIGURE_STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(14, 4.4), width_ratios=(1.25, 1, 0.75), layout="constrained"
        )
        _curves(left, outcomes, methods)
        _weights(middle, best, problem)
        _examples(right, best, data, problem)
        figure.suptitle(f"Hyper-cleaning {data.name}: half of the training labels are wrong", fontweight="bold")
        figure.savefig(path)
        plt.close(figure)
    return path


def _curves(axes: Any, outcomes: Sequence[Any], methods: Sequence[Any]) -> None:
    for o in methods:
        steps, accuracy = zip(*o.curve[1:], strict=True)
        axes.plot(steps, accuracy, DASHES[o.method], color=COLOURS[o.method], lw=2, label=f"{o.method} (AUC {o.auc:.3f})")
    last = methods[0].curve[-1][0]
    for o in outcomes:
        if o.weights is None:
            axes.axhline(o.accuracy, color="0.45", lw=1, zorder=0)
            axes.annotate(o.method, (last, o.accuracy), xytext=(4, 0), textcoords="offset points", va="center", color="0.3")
    axes.set(xlabel="upper step", ylabel="test accuracy", title="learning which labels to believe", xlim=(0, last))
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.06))


def _weights(axes: Any, best: Any, problem: Cleaning) -> None:
    bins = torch.linspace(0, 1, 26).tolist()
    right, wrong = best.weights[problem.clean].tolist(), best.weights[~problem.clean].tolist()
    axes.hist(right, bins, color="#0072B2", alpha=0.85, label="label is right")
    axes.hist(wrong, bins, color="#E69F00", alpha=0.75, hatch="///", edgecolor="white", label="label is wrong")
    axes.set(xlabel="learned weight", ylabel="training examples", title=f"learned weights ({best.method})")
    axes.legend(frameon=False, loc="upper center")


def _examples(axes: Any, best: Any, data: Dataset, problem: Cleaning) -> None:
    """Tile the examples of least weight, each with the label that was given and the true one."""
    least = best.weights.argsort()[:SHOWN]
    height, width = data.shape[-2:]
    images = rearrange(problem.x[least], "(r c) (h w) -> r c h w", c=4, h=height, w=width)
    padded = torch.nn.functional.pad(images, (width // 3, width // 3, 1, 1 + height // 2), value=0.0)
    axes.imshow(rearrange(padded, "r c h w -> (r h) (c w)").numpy(), cmap="gray_r", vmin=0, vmax=1)
    _, columns, tall, wide = padded.shape
    for i, index in enumerate(least.tolist()):
        given, true = int(problem.given[index]), int(problem.true[index])
        place = ((i % columns + 0.5) * wide - 0.5, (i // columns + 1) * tall - 0.5 - height * 0.3)
        colour = "#B24A00" if given != true else "0.3"
        axes.text(*place, f"{given} → {true}", ha="center", va="center", fontsize=9, color=colour)
    wrong = int((~problem.clean[least]).sum())
    axes.set(title=f"believed least: {wrong} of {SHOWN} wrong\n(given label → true label)", xticks=[], yticks=[])
    axes.set_frame_on(False)
