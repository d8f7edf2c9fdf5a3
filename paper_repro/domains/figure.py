"""The figure: accuracy over updates, what each source came to weigh, and the Taylor test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import torch

from paper_repro.data import Dataset
from paper_repro.domains.styles import SOURCES, TARGET, restyle
from paper_repro.domains.taylor import SIZES
from paper_repro.results import FIGURE_STYLE

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

# Okabe and Ito's colours, told apart by the colour-blind; dashes tell the lines apart in black and white.
COLOURS = {"cg": "#D55E00", "itd": "#0072B2", "finite-difference": "#CC79A7", "cg-per-example": "#009E73"}
DASHES = {"cg": "-", "itd": "--", "finite-difference": ":", "cg-per-example": "-."}
MARKS = {"cg": "o", "itd": "s", "finite-difference": "v", "cg-per-example": "D"}
SHOWN = 3  # the digit of the thumbnails


def draw_figure(path: Path, data: Dataset, outcomes: Sequence[Any]) -> Path:
    """Draw the means over all seeds.

    Args:
        path: the PNG to write.
        data: the digits.
        outcomes: baselines and methods.

    Returns:
        The path.
    """
    names = list(dict.fromkeys(o.method for o in outcomes))
    seeds = len({o.seed for o in outcomes})
    with plt.rc_context(FIGURE_STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(15, 5.2), width_ratios=(1.1, 1, 0.9), layout="constrained"
        )
        by_name = {name: [o for o in outcomes if o.method == name] for name in names}
        _curves(left, by_name)
        _weights(middle, {name: mine for name, mine in by_name.items() if mine[0].relative}, data)
        _taylor(right, {name: mine for name, mine in by_name.items() if mine[0].remainders})
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(
            f"Pretrain, finetune, reweight on {data.name}: the target is tilted by 30°, two of nine sources resemble it "
            f"({f'means of {seeds} seeds' if seeds > 1 else 'one seed'})",
            fontweight="bold",
        )
        figure.savefig(path)
        plt.close(figure)
    return path


def _curves(axes: Any, by_name: dict[str, list[Any]]) -> None:
    last = 1
    for name, mine in by_name.items():
        if mine[0].curve:
            curves = torch.tensor([o.curve for o in mine], dtype=torch.float64)
            mean, last = curves.mean(dim=0), curves.shape[1] - 1
            axes.plot(range(last + 1), mean.tolist(), DASHES[name], color=COLOURS[name], lw=2, label=name)
            if len(mine) > 1:
                error = curves.std(dim=0) / len(mine) ** 0.5
                band = (mean - error).tolist(), (mean + error).tolist()
                axes.fill_between(range(last + 1), *band, color=COLOURS[name], alpha=0.12, lw=0)
    heights = sorted((fmean(o.accuracy for o in mine), name) for name, mine in by_name.items() if not mine[0].curve)
    for height, _ in heights:
        axes.axhline(height, color="0.45", lw=1, zorder=0)
    for (_, name), place in zip(heights, _apart([height for height, _ in heights], axes), strict=True):
        axes.annotate(name, (last, place), xytext=(4, 0), textcoords="offset points", va="center", color="0.3")
    axes.set(xlabel="updates of the third level", ylabel="test accuracy in the target style", xlim=(0, last))
    axes.set_title("finetuned under the learned weights")


def _apart(heights: Sequence[float], axes: Any) -> list[float]:
    """Move labels up, from the lowest on, until none covers another."""
    low, high = axes.get_ylim()
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + 0.045 * (high - low)) if places else height)
    return places


def _weights(axes: Any, by_name: dict[str, list[Any]], data: Dataset) -> None:
    """One line for each source, with a digit in its style; a mark for each method's mean weight."""
    example = data.x[data.y == SHOWN][:1]
    places = list(range(len(SOURCES), 0, -1))
    labels = []
    for source, place in zip(SOURCES, places, strict=True):
        axes.axhline(place, color="0.92", lw=6, zorder=0)
        _thumbnail(axes, restyle(example, source.style), place)
        labels.append(source.name.replace(", ", ",\n"))
    _thumbnail(axes, restyle(example, TARGET), places[0] + 1)
    for i, (name, mine) in enumerate(by_name.items()):
        mean = [fmean(o.relative[j] for o in mine) for j in range(len(SOURCES))]
        shift = 0.14 * (i - (len(by_name) - 1) / 2)
        axes.plot(mean, [p - shift for p in places], MARKS[name], color=COLOURS[name], ms=5.5, label=name)
    axes.axvline(1, color="0.45", lw=1, zorder=0)
    axes.set_yticks([places[0] + 1, *places], ["the target", *labels], fontsize=9.5)
    axes.tick_params(axis="y", length=0, pad=30)
    axes.set(xlabel="learned weight (1: as much as any other)", ylim=(0.4, len(SOURCES) + 1.6), xlim=(-0.15, None))
    axes.set_title("what each source came to weigh")
    axes.spines["left"].set_visible(False)


def _thumbnail(axes: Any, x: torch.Tensor, height: float) -> None:
    image = OffsetImage(x[0, :-1].reshape(8, 8).numpy(), cmap="gray_r", zoom=2.6, clim=(0, 1))
    frame = {"edgecolor": "0.7", "linewidth": 0.6}
    box = AnnotationBbox(
        image, (0, height), xybox=(-16, 0), xycoords=("axes fraction", "data"), boxcoords="offset points", pad=0.05,
        bboxprops=frame, annotation_clip=False,
    )  # fmt: skip
    axes.add_artist(box)


def _taylor(axes: Any, by_name: dict[str, list[Any]]) -> None:
    """Each seed's and state's remainder over its value at the largest h: where the gradient is right it falls like h²."""
    for name, mine in by_name.items():
        found = [r for o in mine for r in o.remainders.values()]
        relative = torch.tensor(found, dtype=torch.float64)
        relative = relative / relative[:, :1]
        axes.loglog(SIZES, relative.T.numpy(), color=COLOURS[name], lw=0.8, alpha=0.35)
        middle = relative.log().mean(dim=0).exp()
        axes.loglog(SIZES, middle.tolist(), DASHES[name], marker=MARKS[name], color=COLOURS[name], ms=5.5, label=name)
    place = SIZES[-2]
    for order, text in ((1, "∝ h"), (2, "∝ h²")):
        height = (place / SIZES[0]) ** order
        axes.annotate(text, (place, height), xytext=(9, -9), textcoords="offset points", va="center", fontsize=12)
    axes.set(xlabel="h, what each logit moves by", xlim=(SIZES[-1] * 0.8, SIZES[0] * 1.2))
    axes.set_title("Taylor test: |V(λ+hd) − V(λ) − h⟨g,d⟩|,\nrelative to the largest h")
