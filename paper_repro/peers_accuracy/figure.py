"""The figure: errors over the course, and the time that it took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl

from paper_repro.peers_accuracy.contenders import CONTENDERS
from paper_repro.peers_accuracy.course import Settings
from paper_repro.results import FIGURE_STYLE

mpl.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind; dashes and markers tell the lines apart in black and white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*", "<", ">", "h", "p")


def draw_figure(path: Path, outcomes: Sequence[Any], settings: Settings) -> Path:
    """Draw one draw's outcomes.

    Args:
        path: the PNG to write.
        outcomes: what the contenders did.
        settings: the rules.

    Returns:
        The path.
    """
    ran = [outcome for outcome in outcomes if outcome.steps]
    with plt.rc_context(FIGURE_STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), layout="constrained")
        for outcome in ran:
            look = _look(outcome.contender)
            spent = list(accumulate(outcome.steps))
            left.plot(spent, range(1, len(spent) + 1), label=outcome.contender, markevery=0.17, **look)
            right.plot(outcome.errors, markevery=0.17, **look)
        right.axhline(settings.tolerance, color="0.4", lw=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 4), "textcoords": "offset points"}
        right.annotate("tolerance", (1, settings.tolerance), ha="right", **place)
        left.set(xscale="log", xlabel="seconds", ylabel="hypergradients delivered", title="along the course")
        right.set(yscale="log", xlabel="outer step", ylabel="relative error", title="error of each hypergradient")
        if ran:
            figure.legend(frameon=False, loc="outside right center")
        figure.suptitle(f"Hypergradients within {settings.tolerance:g}: hyper-cleaning of digits", fontweight="bold")
        figure.savefig(path)
        plt.close(figure)
    return path


def _look(contender: str) -> dict[str, Any]:
    i = list(CONTENDERS).index(contender)
    own = contender == "funcmlo"
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "ls": _DASHES[i % len(_DASHES)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "ms": 5.5,
        "lw": 2.4 if own else 1.3,
    }
