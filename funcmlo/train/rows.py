"""One row of a run's history: a step's metrics as plain numbers, by column."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from funcmlo.hypergrad.stats import Stats


def row(metrics: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float] = {}) -> dict[str, float]:
    """Return what `step` tells as numbers.

    Args:
        metrics: by level, as `program.step` returns them.
        seconds: how long each level took.

    Returns:
        By column: `level/cost`, `level/gradient_norm` (`level/hypergradient_norm` where it comes through levels below),
        `level/seconds`, `level/name` for each scalar of the loss's own, `level/lower/statistic` for each statistic of the
        response of a level below; means where there is a number for each task.

    Example:
        >>> import torch
        >>> row({"x": {"cost": torch.tensor(0.5), "aux": {"accuracy": 1.0}, "gradient_norm": torch.tensor(2.0)}})
        {'x/cost': 0.5, 'x/gradient_norm': 2.0, 'x/accuracy': 1.0}
    """
    found: dict[str, Any] = {}
    for level, told in metrics.items():
        through = "hypergradient_norm" if told.get("stats") else "gradient_norm"
        for name, value in {"cost": told.get("cost"), through: told.get("gradient_norm")}.items():
            found[f"{level}/{name}"] = value
        found[f"{level}/seconds"] = seconds.get(level)
        found |= {f"{level}/{name}": value for name, value in told.get("aux", {}).items() if _is_number(value)}
        for lower, stats in told.get("stats", {}).items():
            plain = {f.name: getattr(stats, f.name) for f in fields(stats)} if isinstance(stats, Stats) else dict(stats)
            found |= {f"{level}/{lower}/{name}": value for name, value in plain.items()}
    return numbers(found)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Return what is a number among some values as floats; tensors with one exchange for each device.

    Args:
        found: numbers, tensors, and other things, which are left out.

    Returns:
        Floats, in the same order; of tensors with several numbers their mean.
    """
    tensors: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in found.items():
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            tensors.setdefault(value.device, {})[name] = value.detach().double().mean()
    read = {
        name: number
        for on_device in tensors.values()
        for name, number in zip(on_device, torch.stack([*on_device.values()]).tolist(), strict=True)
    }
    plain = {name: float(value) for name, value in found.items() if isinstance(value, (int, float, bool))}
    return {name: (read | plain)[name] for name in found if name in read or name in plain}


def memory(device: torch.device) -> float:
    """Return the bytes that the process holds now, and, on a GPU, the most that tensors took there.

    Args:
        device: where the program's parameters are.

    Returns:
        Bytes: of the GPU's memory where there is one, else of the process; NaN where they cannot be known.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform.startswith("linux"):
        with open("/proc/self/statm", "rb") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)
