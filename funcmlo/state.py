"""The state of a program: everything that changes from step to step, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from funcmlo import _tree
from funcmlo._tree import Tree


@dataclass(frozen=True, eq=False)
class State:
    """A program's state, a pytree of optree and of torch: it goes into `step` and a new one comes out.

    Attributes:
        params: each level's parameters.
        optimizer: each level's optimizer state.
        response: each level's estimator state (a warm start, say); None for estimators that keep nothing. Where several
            levels differentiate through it, a dict of such states by their names.
        buffers: each level's buffers, such as BatchNorm's running statistics; empty dicts where there are none.
        step: how many updates each level has made; integers, constants under every map.
        seed: where all randomness comes from; an integer, a constant under every map.
    """

    params: dict[str, Tree]
    optimizer: dict[str, Tree]
    response: dict[str, Any]
    buffers: dict[str, Tree] = field(default_factory=dict)
    step: dict[str, int] = field(default_factory=dict)
    seed: int = 0

    def __repr__(self) -> str:
        """Show each level's size and step instead of its numbers."""
        levels = ", ".join(f"{n}: {_tree.size(p):,} at step {self.step.get(n, 0)}" for n, p in self.params.items())
        return f"State({levels}; seed={self.seed})"


_tree.register(State, children=("params", "optimizer", "response", "buffers"), constants=("step", "seed"))
