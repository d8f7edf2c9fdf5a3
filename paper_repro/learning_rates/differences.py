"""Is the hypergradient the derivative of the validation loss? Central differences in float64 say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

import funcmlo as fm

STEPS = (2e-3, 5e-4, 1e-4, 2e-5)


def relative_error(program: fm.Multilevel, state: fm.State, seed: int = 0) -> float:
    """Return |⟨g, d⟩ − D| / |D| for the hypergradient g and the derivative D along a direction d.

    V is the validation loss after a whole training; D(h) = [8 (V(h) − V(−h)) − (V(2h) − V(−2h))] / 12h, whose error is
    O(h⁴). Of several steps h the one is taken whose D differs least from the next smaller one's, which g has no part in.
    The direction has random entries ±1, so that every learned logarithm moves by h.

    Args:
        program: levels `classifier` and `rates`, without batches.
        state: where it stands; float64.
        seed: decides d.

    Returns:
        The relative error.
    """
    generator = torch.Generator().manual_seed(seed)
    at = state.params["rates"]
    direction = {name: torch.randint(2, x.shape, generator=generator).to(x.dtype) * 2 - 1 for name, x in at.items()}

    def value(h: float) -> float:
        moved = {name: x + h * direction[name] for name, x in at.items()}
        return float(program.cost(replace(state, params={**state.params, "rates": moved}), {}, of="rates"))

    found_at = []
    for h in STEPS:
        near, far = value(h) - value(-h), value(2 * h) - value(-2 * h)
        found_at.append((8 * near - far) / (12 * h))
    expected, _ = min(pairwise(found_at), key=lambda pair: abs(pair[0] - pair[1]))
    gradient = program.hypergradient(state, {}, of="rates")
    found = sum(float((g * direction[name]).sum()) for name, g in gradient.items())
    return abs(found - expected) / abs(expected)
