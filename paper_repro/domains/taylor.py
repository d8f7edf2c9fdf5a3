"""The Taylor test: is the hypergradient the derivative of what the program does?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import funcmlo as fm

SIZES = (10**-1.5, 1e-2, 10**-2.5, 1e-3)


def remainders(program: fm.Multilevel, state: fm.State, sizes: Sequence[float] = SIZES, seed: int = 0) -> list[float]:
    """Return |V(λ + hd) − V(λ) − h⟨g, d⟩| for several h.

    V is the third level's cost after the levels below have been solved again by the program itself, from the same
    state but for λ; g is the program's hypergradient; d is a random direction of entries ±1, so that h is what each
    logit moves by.

    Args:
        program: levels pretrain, finetune, reweight, without batches.
        state: where it stands; float64.
        sizes: the values of h.
        seed: decides d.

    Returns:
        One remainder for each h.
    """
    at = state.params["reweight"]
    signs = torch.randint(2, at.shape, generator=torch.Generator().manual_seed(seed))
    direction = signs.to(at.dtype) * 2 - 1

    def value(reweight: Tensor) -> float:
        _, metrics = program.step(replace(state, params={**state.params, "reweight": reweight}), {})
        return float(metrics["reweight"]["cost"])

    slope = float((program.hypergradient(state, {}, of="reweight") * direction).sum())
    here = value(at)
    return [abs(value(at + h * direction) - here - h * slope) for h in sizes]


def order(found: Sequence[float], sizes: Sequence[float] = SIZES) -> float:
    """Return the p of R(h) ~ hᵖ by least squares: 2 for a gradient, 1 for anything else.

    Args:
        found: the remainders, none of them zero.
        sizes: the values of h.

    Returns:
        The slope of log R over log h.
    """
    x, y = [math.log(h) for h in sizes], [math.log(r) for r in found]
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    rise = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / math.fsum((a - mean_x) ** 2 for a in x)
