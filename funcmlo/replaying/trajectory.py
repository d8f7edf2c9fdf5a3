"""Inner steps that are differentiated, replayed with what their derivatives need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmlo import _diff, _reached, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Fixed
from funcmlo.hypergrad.solved import Keep, Standing, held
from funcmlo.problem import Problem
from funcmlo.recording.tape import below_autograd
from funcmlo.replaying.layout import Layout
from funcmlo.replaying.recording import Recording, Tensors, replayable
from funcmlo.replaying.steps import alike, forward


class Loop(NamedTuple):
    """A loop whose steps were replayed, with what their derivative needs.

    Attributes:
        begin: the standing before the first step.
        end: the standing after the last one.
        costs: the cost before each step.
        aux: the last step's metrics.
        gradient: its gradient.
        stays: the standings that were asked for.
        pull: the way back.
    """

    begin: Standing
    end: Standing
    costs: list[Tensor]
    aux: Any
    gradient: Tree
    stays: dict[int, Standing]
    pull: Pull


@dataclass(frozen=True, eq=False)
class Pull:
    """v ↦ (∂y_T/∂input)ᵀ v through replayed steps.

        z_{t+1} = Φ_t(z_t, x),  z = (y, s):    z̄_t = (∂Φ_t/∂z)ᵀ z̄_{t+1},    x̄ = Σ_t (∂Φ_t/∂x)ᵀ z̄_{t+1} + (∂z_0/∂x)ᵀ z̄_0.

    Attributes:
        problem: the level, bound.
        standing: where it stood before the loop.
        inputs: x.
        kept: what each step left for its way back.
        backward: that way.
        zeros: a zero for each floating-point tensor of z.
    """

    problem: Problem
    standing: Standing
    inputs: dict[str, Tree]
    kept: Sequence[Any] = field(repr=False)
    backward: Any = field(repr=False)
    zeros: list[Tensor] = field(repr=False)

    def __call__(self, cotangent: Tree) -> dict[str, Tree]:
        """Return the cotangents by input name."""
        own = _tree.leaves(cotangent)
        bar: list[Tensor] = [*own, *self.zeros[len(own) :]]
        read, structure = _tree.flatten(self.inputs)
        sums: list[Tensor | None] = [None] * len(read)
        with below_autograd():
            for kept in reversed(self.kept):
                found = self.backward(kept, *bar)
                bar = [zero if x is None else x for x, zero in zip(found, self.zeros, strict=False)]
                for i, x in enumerate(found[len(bar) :]):
                    if x is not None:
                        before = sums[i]
                        sums[i] = x if before is None else before + x
        _reached.tell(self.inputs, sums)
        total: dict[str, Tree] = _tree.unflatten(
            structure, [torch.zeros_like(x) if g is None else g for x, g in zip(read, sums, strict=True)]
        )
        if self.problem.level.init is None:
            return total
        begin: dict[str, Tree] = _diff.with_vjp(
            lambda x: (_tree.floating(self.problem.start(x, *self.standing))[0], None),
            [self.inputs],
            lambda _, __, back: back(bar)[0],
        )
        return dict(_tree.add(total, begin))


def loop(
    problem: Problem,
    standing: Standing,
    inputs: dict[str, Tree],
    steps: int,
    keep: Keep,
    *,
    wanted: bool = True,
    trusting: bool = True,
) -> Loop | None:
    """Run a loop by replaying its steps, keeping what their derivative needs.

    Args:
        problem: the level, bound.
        standing: where it stands.
        inputs: the parameters of the levels that it reads.
        steps: how many.
        keep: which standings are to be kept.
        wanted: whether anybody asks for the steps' costs; what only a cost needs is else left out.
        trusting: whether steps may be replayed as another loop recorded them; the last one is held against what is written.

    Returns:
        The loop; None where it has to be run and differentiated as it is written.
    """
    if not replayable(problem, steps, tasks=True) or _tracing.recording(standing, inputs):
        return None
    with torch.no_grad():
        begin = _tree.map(_spread, problem.start(inputs, *standing))
    layout = Layout.of(problem, begin, inputs)
    first = None if layout is None else layout.flat(problem, begin, 0)
    if layout is None or first is None:
        return None
    zeros = _tree.zeros_like(_tree.floating(begin)[0])
    function, name = _step_and_products, "step and products"
    if not wanted:
        function, name = _costless, "step and products without cost"
    recording = Recording(problem, function, layout, name)
    if problem.compiler is not None or (trusting and isinstance(problem.feed, Fixed)):
        recording.trust(first, zeros)
    trusted = recording.forward is not None and problem.compiler is None
    if recording.refused(first, zeros) or not recording.ready(problem, first, zeros):
        return None
    n, m = layout.standing.num_leaves, len(_tree.leaves(begin[0]))
    now, before, costs, ways, stays = begin, begin, list[Tensor](), list[Any](), dict[int, Standing]()
    found: Sequence[Any] = ()
    for t in range(steps):
        flat = layout.flat(problem, now, t)
        if flat is None:
            return None
        if t in keep.before:
            stays[t] = held(now, keep.on_cpu)
        found, kept = forward(recording, problem, flat, t)
        before, now = now, _tree.unflatten(layout.standing, found[:n])
        costs += found[n : n + wanted]
        ways.append(kept)
    found = list(found) if wanted else [*found[:n], None, *found[n:]]
    if trusted and not alike(found, _results(problem, *_traced(before, inputs), steps - 1)[0]):
        return loop(problem, standing, inputs, steps, keep, wanted=wanted, trusting=False)
    gradient = _tree.unflatten(_tree.structure(begin[0]), found[n + 1 : n + 1 + m])
    pull = Pull(problem, standing, inputs, ways, recording.backward, zeros)
    return Loop(begin, now, costs, recording.extra(list(found[n + 1 + m :])), gradient, stays, pull)


def _spread(x: Tensor) -> Tensor:
    """A start that tasks share, with memory for each, as it has after a step."""
    return x.contiguous() if isinstance(x, Tensor) and 0 in x.stride() else x


def _step_and_products(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, Any]:
    """A step with its gradient and metrics, and its products with cotangents: by its standing, then by its inputs."""
    z, read = _tree.floating(standing)[0], _tree.leaves(inputs)
    for x in (*z, *read):
        x.requires_grad_()
    results, whole = _results(problem, standing, inputs, t)
    new = _tree.unflatten(_tree.structure(standing), results[: len(_tree.leaves(standing))])
    live = [(x, v) for x, v in zip(_tree.floating(new)[0], cotangents, strict=True) if x.requires_grad]
    products: Tensors = [None] * (len(z) + len(read))
    if live:
        outputs, vs = zip(*live, strict=True)
        products = torch.autograd.grad(outputs, [*z, *read], vs, allow_unused=True)
    return results, products, whole


def _costless(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, Any]:
    """The same without the cost."""
    results, products, whole = _step_and_products(problem, standing, inputs, cotangents, t)
    n = len(_tree.leaves(standing))
    return [*results[:n], *results[n + 1 :]], products, whole


def _results(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], t: int
) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """A step as it is written and recorded by autograd: its standing, cost, gradient and metrics."""
    with torch.enable_grad():
        gradient, cost, aux = problem.gradient(standing[0], inputs, t)
        new = problem.apply(*standing, inputs, gradient, t)
    tensors, whole = _tree.partition(aux)
    return [*_tree.leaves(new), cost, *_tree.leaves(gradient), *tensors], whole


def _traced(standing: Standing, inputs: dict[str, Tree]) -> tuple[Standing, dict[str, Tree]]:
    """Aliases that require grad, where they can."""

    def alias(x: Tensor) -> Tensor:
        return x.detach().requires_grad_() if x.is_floating_point() else x

    return _tree.map(alias, standing), _tree.map(alias, inputs)
