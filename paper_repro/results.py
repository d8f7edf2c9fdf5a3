"""Results on disk and on screen: `results.json` and the text table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torchopt

import funcmlo

FIGURE_STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}
"""How the experiments' figures look."""


def environment() -> dict[str, Any]:
    """Return the versions and the kind of machine that numbers depend on."""
    return {
        "funcmlo": funcmlo.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchopt": torchopt.__version__,
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write results so that an interrupted run never leaves half a file.

    Args:
        path: where to; replaced if it is there.
        content: numbers, strings, lists and dicts.

    Returns:
        The path.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def spread(values: Sequence[float | None], form: str) -> str:
    """Write mean ± standard deviation over seeds, or the value alone for one seed; «–» where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = format(statistics.fmean(known), form)
    return mean if len(known) == 1 else f"{mean} ± {format(statistics.stdev(known), form)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table: the first column to the left, the others to the right.

    Args:
        header: the columns' names.
        rows: cells as text.

    Returns:
        Lines without a newline at the end.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
