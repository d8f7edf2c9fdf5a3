"""Reverse mode through an inner loop whose graph is not kept: its steps are made again from standings.

    z_{t+1} = Φ_t(z_t, x),  z = (y, s):    z̄_t = (∂Φ_t/∂z)ᵀ z̄_{t+1},    x̄ = Σ_t (∂Φ_t/∂x)ᵀ z̄_{t+1} + (∂z_0/∂x)ᵀ z̄_0.

One step's graph lives at a time. In mixed mode not even that of the inner gradient: with (u, s′) = A(y, s, g, x) and
g = ∇_y g_t(y, x), the optimizer A is differentiated in reverse, and its cotangent ḡ is carried through the gradient by
forward mode over reverse mode, (∇²_yy g_t ḡ, ∇²_xy g_t ḡ), since second derivatives commute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from funcmlo import _diff, _forward, _tree, optim
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.checkpoint import Checkpoint, Every
from funcmlo.hypergrad.solved import Solved, Standing, held

Floats = list[Tensor]
"""The differentiable tensors of a standing."""


@dataclass
class Rewind:
    """One reverse pass through an inner loop.

    Attributes:
        solved: the loop.
        schedule: which standings are kept.
        on_cpu: whether they are kept in the CPU's memory.
        replayed: inner steps made again without being differentiated.
    """

    solved: Solved
    schedule: Checkpoint | Every
    on_cpu: bool = False
    replayed: int = 0
    _inputs_bar: dict[str, Tree] = field(default_factory=dict)

    def pullback(self, cotangent: Tree, first: int) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent through the steps first ≤ t < T, and the start where first is 0.

        Args:
            cotangent: a tree like the parameters.
            first: the first step that is differentiated.

        Returns:
            The cotangents by input name.
        """
        solved = self.solved
        self._inputs_bar = _tree.zeros_like(solved.inputs)
        memory, _ = _tree.floating(solved.opt_state)
        bar = [*_tree.leaves(cotangent), *_tree.zeros_like(memory)]
        bar = self._segment(first, solved.steps, self.standing(first), bar, 0)
        if first == 0:
            self._add(
                _diff.with_vjp(
                    lambda x: (_tree.floating(solved.start(x))[0], None), [solved.inputs], lambda _, __, back: back(bar)[0]
                )
            )
        return self._inputs_bar

    def recorded(self, cotangent: Tree, first: int) -> dict[str, Tree]:
        """Return the same as `pullback` through one graph of all the steps first ≤ t < T.

        Args:
            cotangent: a tree like the parameters.
            first: the first step that is differentiated.

        Returns:
            The cotangents by input name.
        """
        solved = self.solved
        begin = self.standing(first) if first else None

        def loop(x: dict[str, Tree]) -> tuple[Tree, None]:
            y, s = solved.start(x) if begin is None else begin
            for t in range(first, solved.steps):
                y, s = solved.update(y, s, x, t)
            return y, None

        products: dict[str, Tree] = _diff.with_vjp(loop, [solved.inputs], lambda _, __, back: dict(back(cotangent)[0]))
        return products

    def _segment(self, first: int, last: int, standing: Standing, bar: Floats, depth: int) -> Floats:
        """z̄_last ↦ z̄_first, from the standing before the first step."""
        if last - first == 1:
            return self._mixed(first, standing, bar) if self.schedule.mixed else self._step(first, standing, bar)
        cuts = self.schedule.cuts(first, last, depth)
        kept = {first: standing}
        del standing
        for t, until in pairwise(cuts):
            kept[until] = self._forward(self._fetched(kept[t]), t, until, depth)
        for t, until in reversed(list(zip(cuts, [*cuts[1:], last], strict=True))):
            bar = self._segment(t, until, self._fetched(kept.pop(t)), bar, depth + 1)
        return bar

    def _forward(self, standing: Standing, first: int, last: int, depth: int) -> Standing:
        """The standing before step last, as it is kept: the one that the loop left, or made again."""
        if last in self.solved.kept and depth == 0:
            return self.solved.kept[last]
        with torch.no_grad():
            for t in range(first, last):
                standing = self.solved.update(*standing, self.solved.inputs, t)
                self.replayed += 1
        return held(standing, self.on_cpu)

    def standing(self, first: int) -> Standing:
        """Return the standing before the first step that is differentiated.

        Args:
            first: that step.

        Returns:
            Parameters and optimizer state.
        """
        if first in self.solved.kept:
            return self._fetched(self.solved.kept[first])
        return self._fetched(self._forward(self.solved.init, 0, first, 0))

    def _fetched(self, standing: Standing) -> Standing:
        """A standing where the parameters are."""
        fetched: Standing = _tree.like(standing, (self.solved.params, self.solved.opt_state))
        return fetched

    def _step(self, t: int, standing: Standing, bar: Floats) -> Floats:
        """z̄_{t+1} ↦ z̄_t through one graph of the step."""
        z, whole = _tree.floating(standing)

        def step(z: Floats, x: dict[str, Tree]) -> tuple[Floats, None]:
            return _tree.floating(self.solved.update(*whole(z), x, t))[0], None

        z_bar, x_bar = _diff.with_vjp(step, [z, self.solved.inputs], lambda _, __, back: back(bar))
        self._add(x_bar)
        return list(z_bar)

    def _mixed(self, t: int, standing: Standing, bar: Floats) -> Floats:
        """z̄_{t+1} ↦ z̄_t, the inner gradient in forward mode over reverse mode."""
        parts, x = self.solved.parts, self.solved.inputs
        if parts is None:
            raise EstimatorError(
                "mixed mode takes the inner step apart into a gradient and an optimizer, which a fixed point has not; use "
                "memory='recompute' or Checkpoint()."
            )
        z, whole = _tree.floating(standing)
        y = standing[0]

        def cost(at: Tree, inputs: dict[str, Tree]) -> tuple[Tensor, None]:
            return parts.cost(at, inputs, t), None

        with torch.no_grad():
            _, _, (slope,), _ = _diff.value_and_grads(lambda at: cost(at, x), [y])

        def applied(z: Floats, gradient: Tree, inputs: dict[str, Tree]) -> tuple[Floats, None]:
            at, state = whole(z)
            u, state = parts.updates(at, state, inputs, gradient, t)
            moved = optim.apply(at, u)
            excess = parts.excess(moved, inputs, t)
            return _tree.floating((moved if excess is None else _tree.add(moved, excess), state))[0], None

        z_bar, slope_bar, x_bar = _diff.with_vjp(applied, [z, slope, x], lambda _, __, back: back(bar))
        y_more, x_more = _forward.jvp_of_gradients(cost, [y, x], 0, slope_bar)
        self._add(x_bar)
        self._add(x_more)
        more = _tree.leaves(y_more)
        return [*_tree.add(list(z_bar[: len(more)]), more), *z_bar[len(more) :]]

    def _add(self, products: dict[str, Tree]) -> None:
        self._inputs_bar = _tree.add(self._inputs_bar, products)
