"""Inner loops whose steps are replayed: with nothing kept, or with what their derivative needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcmlo import _diff, _random, _reached, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.hypergrad.solved import Keep, Standing, held
from funcmlo.batches import Fixed
from funcmlo.problem import Problem
from funcmlo.recording.tape import below_autograd
from funcmlo.replaying import Function, Layout, Recording, Tensors, compiles, replayable


class Steps:
    """Steps that nobody differentiates: the first two as they are written, the others replayed where that is possible."""

    def __init__(self, layout: Layout, recording: Recording) -> None:
        self._layout, self._recording = layout, recording

    @staticmethod
    def of(problem: Problem, standing: Standing, inputs: dict[str, Tree], steps: int) -> Steps | None:
        """Return the steps of a loop that begins, or None where they are made one by one, as they are written.

        Args:
            problem: the level, bound.
            standing: where the loop begins.
            inputs: the parameters of the levels that it reads.
            steps: how many there are.
        """
        if torch.is_grad_enabled() or not replayable(problem, steps):
            return None
        layout = Layout.of(problem, standing, inputs)
        if layout is None:
            return None
        recording = Recording(problem, _update, layout, "step")
        first = layout.flat(problem, standing, 0)
        if first is None or recording.refused(first, ()):
            return None
        if problem.compiler is not None and not recording.ready(problem, first, ()):
            return None
        return Steps(layout, recording)

    @property
    def ready(self) -> bool:
        """Whether steps can be replayed one after the other, with nothing asked for between them."""
        return self._recording.forward is not None and self._layout.batch_leaves is None and not self._recording.draws

    def through(self, standing: Standing, first: int, last: int) -> tuple[Tree, Tree, list[Tensor]]:
        """Make the steps first ≤ t < last; return the new standing and the costs before each."""
        step, n = self._recording.forward, self._layout.standing.num_leaves
        assert step is not None
        z, costs = _tree.leaves(standing), list[Tensor]()
        with below_autograd():
            for _ in range(first, last):
                found, _ = step(*z)
                z = found[:n]
                costs.append(found[n])
        return *_tree.unflatten(self._layout.standing, z), costs

    def update(self, problem: Problem, standing: Standing, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Tensor]:
        """Make step t; return the new standing and the cost before it."""
        recording, n = self._recording, self._layout.standing.num_leaves
        flat = None if recording.given_up else self._layout.flat(problem, standing, t)
        if flat is None:
            return problem.update(*standing, inputs, t)[:3]
        if recording.forward is None:
            found: Sequence[Any] = recording.again(problem, flat, (), t)
        else:
            found, _ = forward(recording, problem, flat, t)
        return *_tree.unflatten(self._layout.standing, found[:n]), found[n]


def _update(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Tensors, t: int
) -> tuple[Tensors, Tensors, None]:
    y, s, cost, _ = problem.update(*standing, inputs, t)
    return [*_tree.leaves((y, s)), cost], cotangents, None


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


class Loop(NamedTuple):
    """A loop whose steps were replayed, with what their derivative needs.

    Attributes:
        states: the standings before the first step and after each one.
        costs: the cost before each step.
        aux: the last step's metrics.
        gradient: its gradient.
        stays: the standings that were asked for.
        pull: the way back.
    """

    states: tuple[Standing, ...]
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


def loop(problem: Problem, standing: Standing, inputs: dict[str, Tree], steps: int, keep: Keep) -> Loop | None:
    """Run a loop by replaying its steps, keeping what their derivative needs.

    Args:
        problem: the level, bound.
        standing: where it stands.
        inputs: the parameters of the levels that it reads.
        steps: how many.
        keep: which standings are to be kept.

    Returns:
        The loop; None where it has to be run and differentiated as it is written.
    """
    if not replayable(problem, steps) or _tracing.recording(standing, inputs):
        return None
    with torch.no_grad():
        begin = problem.start(inputs, *standing)
    layout = Layout.of(problem, begin, inputs)
    first = None if layout is None else layout.flat(problem, begin, 0)
    if layout is None or first is None:
        return None
    zeros = _tree.zeros_like(_tree.floating(begin)[0])
    recording = Recording(problem, _step_and_products, layout, "step and products")
    if recording.refused(first, zeros) or not recording.ready(problem, first, zeros):
        return None
    n, m = layout.standing.num_leaves, len(_tree.leaves(begin[0]))
    states, costs, ways, stays = [begin], list[Tensor](), list[Any](), dict[int, Standing]()
    found: Sequence[Any] = ()
    for t in range(steps):
        flat = layout.flat(problem, states[-1], t)
        if flat is None:
            return None
        if t in keep.before:
            stays[t] = held(states[-1], keep.on_cpu)
        found, kept = forward(recording, problem, flat, t)
        states.append(_tree.unflatten(layout.standing, found[:n]))
        costs.append(found[n])
        ways.append(kept)
    gradient = _tree.unflatten(_tree.structure(begin[0]), found[n + 1 : n + 1 + m])
    pull = Pull(problem, standing, inputs, ways, recording.backward, zeros)
    return Loop(tuple(states), costs, recording.extra(list(found[n + 1 + m :])), gradient, stays, pull)


def _step_and_products(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], cotangents: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, Any]:
    """A step with its gradient and metrics, and its products with cotangents: by its standing, then by its inputs."""
    z, read = _tree.floating(standing)[0], _tree.leaves(inputs)
    for x in (*z, *read):
        x.requires_grad_()
    with torch.enable_grad():
        gradient, cost, aux = problem.gradient(standing[0], inputs, t)
        new = problem.apply(*standing, inputs, gradient, t)
    tensors, whole = _tree.partition(aux)
    live = [(x, v) for x, v in zip(_tree.floating(new)[0], cotangents, strict=True) if x.requires_grad]
    products: Tensors = [None] * (len(z) + len(read))
    if live:
        outputs, vs = zip(*live, strict=True)
        products = torch.autograd.grad(outputs, [*z, *read], vs, allow_unused=True)
    results = [*_tree.leaves(new), cost, *_tree.leaves(gradient), *tensors]
    return results, products, whole


def products(problem: Problem, params: Tree, inputs: dict[str, Tree], t: int) -> Products | None:
    """Return the products of a compiled level's second derivatives with vectors, at one point.

    Args:
        problem: the level, bound.
        params: y, the point.
        inputs: x.
        t: the step whose batch and randomness are bound.

    Returns:
        v ↦ ∇²_yy g v and v ↦ ∇²_xy g v; None where they are to be taken from the cost as it is written.
    """
    if not compiles(problem) or _tracing.recording(params, inputs):
        return None
    still = replace(problem, feed=Fixed(problem.feed(problem.first + t)), first=problem.first + t)
    layout = Layout.of(still, (), inputs, params)
    if layout is None:
        return None
    vector = _tree.leaves(params)

    def made(function: Function, name: str) -> Callable[[Tree], Sequence[Any]] | None:
        recording = Recording(still, function, layout, name)
        if recording.refused((), vector) or not recording.ready(still, (), vector):
            return None
        assert recording.forward is not None
        with below_autograd():
            _, kept = recording.forward()

        def product(v: Tree) -> Sequence[Any]:
            with below_autograd():
                assert recording.backward is not None
                return recording.backward(kept, *_tree.leaves(v))  # type: ignore[no-any-return]

        return product

    hessian, cross = made(_own_products, "Hessian-vector product"), made(_cross_products, "cross product")
    if hessian is None or cross is None:
        return None
    return Products(hessian, cross, params, inputs)


@dataclass(frozen=True, eq=False)
class Products:
    """Second derivatives' products with vectors at a point."""

    _hessian: Callable[[Tree], Sequence[Any]]
    _cross: Callable[[Tree], Sequence[Any]]
    params: Tree
    inputs: dict[str, Tree]

    def hessian(self, v: Tree) -> Tree:
        """Return ∇²_yy g v."""
        leaves, structure = _tree.flatten(self.params)
        return _tree.unflatten(structure, _materialized(self._hessian(v), leaves))

    def cross(self, v: Tree) -> dict[str, Tree]:
        """Return ∇²_xy g v for every input."""
        leaves, structure = _tree.flatten(self.inputs)
        found = self._cross(v)
        _reached.tell(self.inputs, found)
        answer: dict[str, Tree] = _tree.unflatten(structure, _materialized(found, leaves))
        return answer


def _materialized(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, like, strict=True)]


def _own_products(
    problem: Problem, params: Tree, inputs: dict[str, Tree], vector: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, None]:
    return [], _second(problem, params, inputs, _tree.leaves(params), vector), None


def _cross_products(
    problem: Problem, params: Tree, inputs: dict[str, Tree], vector: Sequence[Tensor], t: int
) -> tuple[Tensors, Tensors, None]:
    return [], _second(problem, params, inputs, _tree.leaves(inputs), vector), None


def _second(
    problem: Problem, params: Tree, inputs: dict[str, Tree], by: list[Tensor], vector: Sequence[Tensor]
) -> Tensors:
    """∇_by ⟨∇_y g, v⟩."""
    for x in (*_tree.leaves(params), *_tree.leaves(inputs)):
        x.requires_grad_()
    with torch.enable_grad():
        gradient, _, _ = problem.gradient(params, inputs, 0)
    live = [(x, v) for x, v in zip(_tree.leaves(gradient), vector, strict=True) if x.requires_grad]
    if not live:
        return [None] * len(by)
    outputs, vs = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, by, vs, allow_unused=True))
