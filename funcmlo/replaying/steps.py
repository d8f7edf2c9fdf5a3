"""Inner steps that nobody differentiates, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Fixed
from funcmlo.hypergrad.solved import Standing
from funcmlo.problem import Problem
from funcmlo.recording.tape import below_autograd
from funcmlo.replaying.layout import Layout
from funcmlo.replaying.recording import Recording, Tensors, replayable


class Steps:
    """Steps that nobody differentiates: the first two as they are written, the others replayed where that is possible."""

    def __init__(self, layout: Layout, recording: Recording) -> None:
        self._layout, self._recording = layout, recording

    @staticmethod
    def of(
        problem: Problem,
        standing: Standing,
        inputs: dict[str, Tree],
        steps: int,
        *,
        costs: bool = True,
        trusting: bool = True,
    ) -> Steps | None:
        """Return the steps of a loop that begins, or None where they are made one by one, as they are written.

        Args:
            problem: the level, bound.
            standing: where the loop begins.
            inputs: the parameters of the levels that it reads.
            steps: how many there are.
            costs: whether anybody asks for their costs; what only a cost needs is else left out.
            trusting: whether what an earlier loop recorded may be taken on trust.

        Returns:
            The steps.
        """
        if torch.is_grad_enabled() or not replayable(problem, steps):
            return None
        layout = Layout.of(problem, standing, inputs)
        if layout is None:
            return None
        function, name = (_update, "step") if costs else (_bare_update, "step without cost")
        if problem.compiler is not None:
            function, name = _whole_update, "step"
        recording = Recording(problem, function, layout, name)
        first = layout.flat(problem, standing, 0)
        if first is None or recording.refused(first, ()):
            return None
        if problem.compiler is not None or (trusting and isinstance(problem.feed, Fixed)):
            recording.trust(first, ())
        if problem.compiler is not None and not recording.ready(problem, first, ()):
            return None
        return Steps(layout, recording)

    @property
    def ready(self) -> bool:
        """Whether steps can be replayed one after the other, with nothing asked for between them."""
        return self._recording.forward is not None and self._layout.batch_leaves is None and not self._recording.draws

    def through(self, standing: Standing, first: int, last: int) -> tuple[Tree, Tree, list[Tensor]]:
        """Make the steps first ≤ t < last; return the new standing and the costs before each, if they are asked for."""
        step, n = self._recording.forward, self._layout.standing.num_leaves
        assert step is not None
        z, costs = _tree.leaves(standing), list[Tensor]()
        with below_autograd():
            for _ in range(first, last):
                found, _ = step(*z)
                z = found[:n]
                costs += found[n : n + 1]
        return *_tree.unflatten(self._layout.standing, z), costs

    def agrees(self, problem: Problem, before: Standing, after: Standing, cost: Tensor, t: int) -> bool:
        """Say whether step t comes to the same bits as when it was made as it is written, or is not replayed at all.

        Args:
            problem: the level, bound.
            before: the standing before the step.
            after: the standing after it.
            cost: the cost before it.
            t: its number.

        Returns:
            Whether it does; of compiled steps, which differ by rounding, it is not asked.
        """
        flat = self._layout.flat(problem, before, t)
        if problem.compiler is not None or self._recording.forward is None or flat is None:
            return True
        found, _ = forward(self._recording, problem, flat, t)
        return alike(found, [*_tree.leaves(after), cost])

    def last(self, problem: Problem, standing: Standing, t: int) -> tuple[Standing, Tensor, Tree, Any] | None:
        """Make step t with all that is ever asked of one, if it is compiled.

        Args:
            problem: the level, bound.
            standing: the standing before the step.
            t: its number.

        Returns:
            The new standing, the cost before, its gradient and the loss's metrics; None where the step is not compiled.
        """
        flat = self._layout.flat(problem, standing, t)
        if problem.compiler is None or self._recording.forward is None or flat is None:
            return None
        found, _ = forward(self._recording, problem, flat, t)
        n, own = self._layout.standing.num_leaves, _tree.structure(standing[0])
        gradient, rest = found[n + 1 : n + 1 + own.num_leaves], found[n + 1 + own.num_leaves :]
        new = _tree.unflatten(self._layout.standing, found[:n])
        return new, found[n], _tree.unflatten(own, gradient), self._recording.extra(list(rest))

    def update(self, problem: Problem, standing: Standing, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Any]:
        """Make step t; return the new standing and the cost before it, None if nobody asks for it."""
        recording, n = self._recording, self._layout.standing.num_leaves
        flat = None if recording.given_up else self._layout.flat(problem, standing, t)
        if flat is None:
            return problem.update(*standing, inputs, t)[:3]
        if recording.forward is None:
            found: Sequence[Any] = recording.again(problem, flat, (), t)
        else:
            found, _ = forward(recording, problem, flat, t)
        return *_tree.unflatten(self._layout.standing, found[:n]), found[n] if len(found) > n else None


def _update(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Tensors, t: int
) -> tuple[Tensors, Tensors, None]:
    y, s, cost, _ = problem.update(*standing, inputs, t)
    return [*_tree.leaves((y, s)), cost], cotangents, None


def _whole_update(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Tensors, t: int
) -> tuple[Tensors, Tensors, Any]:
    gradient, cost, aux = problem.gradient(standing[0], inputs, t)
    new = problem.apply(*standing, inputs, gradient, t)
    tensors, whole = _tree.partition(aux)
    return [*_tree.leaves(new), cost, *_tree.leaves(gradient), *tensors], cotangents, whole


def _bare_update(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Tensors, t: int
) -> tuple[Tensors, Tensors, None]:
    results, products, _ = _update(problem, standing, inputs, cotangents, t)
    return results[:-1], products, None


def alike(some: Tensors, others: Sequence[Tensor]) -> bool:
    """Say whether tensors hold the same numbers, NaN being itself; None stands for any."""
    pairs = [(x, y) for x, y in zip(some, others, strict=False) if x is not None]
    return all(torch.equal(x, y) or bool(((x == y) | (x != x) & (y != y)).all()) for x, y in pairs)


def forward(recording: Recording, problem: Problem, flat: Sequence[Tensor], t: int) -> tuple[Sequence[Any], Any]:
    """Replay a step.

    Args:
        recording: its level's.
        problem: the level, bound.
        flat: what varies.
        t: the step's number.

    Returns:
        Its results, and what its way back needs.
    """
    assert recording.forward is not None
    with below_autograd():
        if recording.draws:
            with _random.seeded(problem.seed_of("", t)):
                found, kept = recording.forward(*flat)
        else:
            found, kept = recording.forward(*flat)
    return found, kept
