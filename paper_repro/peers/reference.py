"""The reference: the same estimator by hand in float64, where a difference is replaced by what it approximates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from paper_repro.peers import by_hand
from paper_repro.peers.problem import Problem, costs_of, flat


def reference(problem: Problem) -> np.ndarray:
    """Return the hypergradient in float64, flat.

    Args:
        problem: what is asked, of any dtype.

    Returns:
        The numbers in the order of the names.
    """
    exact = replace(problem, dtype=torch.float64)
    if problem.estimator != "difference":
        return flat(by_hand.prepare(exact, "")())
    start, hyper = exact.tensors(exact.drawn.start), exact.tensors(exact.drawn.hyper)
    return flat(by_hand.exact_difference(exact, costs_of(exact), start, hyper))
