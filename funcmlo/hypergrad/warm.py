"""Where a warm-started linear solve begins: the last outer step's solution, moved on as solutions have been moving.

    w⁰_k = w_{k−1} + θ (w_{k−1} − w_{k−2}),    θ = ⟨w_{k−1} − w_{k−2}, w_{k−2} − w_{k−3}⟩ / ‖w_{k−2} − w_{k−3}‖², in [0, 1]

θ is the multiple of the move before last that the last move was: near 1 where solutions drift smoothly, near 0 where
batches make them jump about, and it costs no product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree


@dataclass(frozen=True)
class Drift:
    """What is carried from one outer step to the next, a pytree.

    Attributes:
        solution: the last solution w.
        move: by how much it differed from the one before.
        trend: θ, a 0-d tensor.
    """

    solution: Tree
    move: Tree
    trend: Tensor

    @staticmethod
    def begin(like: Tree) -> Drift:
        """Return what is carried before the first solve."""
        first = next(iter(_tree.leaves(like)), torch.zeros(()))
        trend = torch.zeros((), dtype=_tree.precision(like), device=first.device)
        return Drift(_tree.zeros_like(like), _tree.zeros_like(like), trend)

    def start(self) -> Tree:
        """Return where the next solve begins."""
        return _tree.add_scaled(self.solution, self.trend, self.move)

    def after(self, solution: Tree) -> Drift:
        """Return what is carried on.

        Args:
            solution: the solution that was found.

        Returns:
            It, its move and its trend.
        """
        move = _tree.subtract(solution, self.solution)
        length = _tree.norm(self.move)
        known = length > 0
        divisor = torch.where(known, length, 1)  # twice, so that no square under- or overflows
        along = _tree.dot(_tree.scale(1 / divisor, self.move), _tree.scale(1 / divisor, move))
        return Drift(solution, move, torch.where(known, along.clamp(0, 1), 0))


_tree.register(Drift, ("solution", "move", "trend"), ())
