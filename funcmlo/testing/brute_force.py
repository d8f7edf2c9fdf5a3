"""Brute force: plain autograd through every inner update, written without the library's own unrolling.

It shares with the library a level's cost (its batch and its randomness), its optimizer, its projection and its start, and
the order of the updates (`program.schedule()`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._argmin import Argmin
from funcmlo._fixed_point import FixedPoint
from funcmlo._tree import Tree
from funcmlo.batches import Feed, feeds
from funcmlo.binding import bound, with_buffers
from funcmlo.errors import EstimatorError, ParameterError
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.optim import mend
from funcmlo.problem import Problem
from funcmlo.roles import Roles
from funcmlo.schedule import Loop
from funcmlo.signature import BATCH
from funcmlo.state import State
from funcmlo.testing.subjects import cotangent_like, inputs_of, told, wide, wide_state


def unrolled(thing: Any, /, *arguments: Any, **keywords: Any) -> Any:
    """Return the derivative of the inner steps that run, by `torch.autograd` through all of them; in float64.

    - `unrolled(loss, params, inputs, cotangent, *, optimizer, steps)`: of ⟨cotangent, y_T⟩ by every input of
      `loss(params, inputs)`, a dict.
    - `unrolled(program, state, batches, of="x")`: the hypergradient of a level. Every level that has levels below runs their
      loops and follows the total derivative of its cost, which is what `ITD()` everywhere and
      `composition="nested"` do, and `"paths"` too where `program.graph.exact` holds and each level makes one step.
    - `unrolled(solve, init, *inputs, batch=None, cotangent=None)`: for what `fm.argmin` and `fm.fixed_point` return, a dict
      by input name.

    Args:
        thing: a loss, a program, or a solution map.
        *arguments: as above.
        **keywords: `optimizer` and `steps`; `of`; `batch`, `cotangent`, and inputs by name.

    Returns:
        A dict of trees by input name, or a tree like the level's parameters.

    Raises:
        EstimatorError: a level has what cannot be followed: a warm-up still due, `roll_back`, an outside solver.
        ParameterError: the arguments are not as expected.

    Example:
        Two steps of rate 1/2 on (y − x)²/2 take y from 0 to 3x/4:

        >>> import torch, torchopt, funcmlo as fm
        >>> loss = lambda y, inputs: ((y - inputs["x"]) ** 2).sum() / 2
        >>> unrolled(loss, torch.zeros(1), {"x": torch.ones(1)}, torch.ones(1), optimizer=torchopt.sgd(0.5), steps=2)["x"]
        tensor([0.7500], dtype=torch.float64)
    """
    if isinstance(thing, Multilevel):
        return _of_program(thing, *arguments, **keywords)
    if isinstance(thing, (Argmin, FixedPoint)):
        return _of_solve(thing, *arguments, **keywords)
    return _of_loss(thing, *arguments, **keywords)


def _of_loss(
    loss: Callable[..., Tensor], params: Tree, inputs: dict[str, Tree], cotangent: Tree, *, optimizer: Any, steps: int
) -> dict[str, Tree]:
    start, made = wide(params), mend(optimizer)

    def loop(x: dict[str, Tree]) -> Tree:
        y, state = start, made.init(start)
        for _ in range(steps):
            at = _own(y)
            updates, state = made.update(_gradient(loss(at, x), at), state, params=y, inplace=False)
            y = _tree.map(lambda p, u: p + u.to(p.dtype), y, updates)
        return y

    return _pulled("the loss", loop, wide(inputs), cotangent_like(start, cotangent))


def _of_solve(
    solve: Argmin | FixedPoint, init: Tree, *inputs: Tree, batch: Any = None, cotangent: Tree = None, **by_name: Tree
) -> dict[str, Tree]:
    start, data = wide(init), wide(batch)
    vectors, everything = inputs_of(solve, inputs, by_name)
    feed = data if callable(data) else lambda t: data

    def descend(x: dict[str, Tree]) -> Tree:
        assert isinstance(solve, Argmin)
        _followed(solve.level, 0)
        problem = Problem(solve.level, feed, solve.seed, 0, {n: t for n, t in everything.items() if n not in vectors})
        y, state = start, problem.optimizer(x).init(start)
        for t in range(solve.level.steps):
            at = _own(y)
            y, state = problem.apply(y, state, x, _gradient(problem.cost(at, x, t)[0], at), t)
        return y

    def iterate(x: dict[str, Tree]) -> Tree:
        assert isinstance(solve, FixedPoint)
        y = start
        for _ in range(solve.steps):
            with _random.seeded(_random.step_seed(solve.seed, "fixed_point", 0)):
                y = solve.map(y, values={**everything, **x, BATCH: data})
        return y

    loop = descend if isinstance(solve, Argmin) else iterate
    return _pulled(type(solve).__name__.lower(), loop, vectors, cotangent_like(start, cotangent))


def _pulled(name: str, loop: Callable[[dict[str, Tree]], Tree], x: dict[str, Tree], v: Tree) -> dict[str, Tree]:
    """The gradient of ⟨v, y_T⟩ by the inputs."""
    with torch.enable_grad(), told(name):
        at: dict[str, Tree] = _own(x)
        gradient: dict[str, Tree] = _tree.detach(_gradient(_tree.dot(v, loop(at)), at))
    return gradient


def _of_program(program: Multilevel, state: State, batches: Any, *, of: str) -> Tree:
    program.graph.check(of)
    if not isinstance(state, State):
        raise ParameterError(f"expected the State that program.init returns; {type(state).__name__} came.")
    state, batches = wide_state(state, batches)
    before, own = program.schedule().before(of)
    levels = {level.name: level for level in program.levels}
    loops = [item for item in (*before, *own.first) if isinstance(item, Loop)]
    running = {of}.union(*(loop.levels() for loop in loops))
    for name in running - {of}:
        _followed(levels[name], state.step[name])
    feed = feeds(
        [levels[name] for name in running],
        program.graph.levels,
        batches,
        state.step,
        pure=True,
        tasks=program._plan.roles.tasks,
    )
    world = _World(levels, feed, program._plan.roles, state)
    with torch.enable_grad(), told(f"level '{of}'"):
        for item in before:
            world.begin(item) if isinstance(item, str) else world.run(item)
        world.cut()
        return _tree.detach(world.gradient(own, 0)[0])


@dataclass
class _World:
    """Where all levels stand, with the graph of how they came there."""

    levels: dict[str, Level]
    feed: dict[str, Feed]
    roles: Roles
    state: State

    def run(self, loop: Loop) -> None:
        """Make all updates of a loop."""
        if not loop.steps:
            for inner in loop.first:
                self.run(inner)
        name = loop.level
        for t in range(loop.steps):
            gradient, own = self.gradient(loop, t)
            problem, opt_state = self._problem(name), self.state.optimizer[name]
            self._put(name, *problem.apply(own, opt_state, self._inputs(name), gradient, t))
        self.state = replace(self.state, step={**self.state.step, name: self.state.step[name] + loop.steps})

    def gradient(self, loop: Loop, t: int) -> tuple[Tree, Tree]:
        """The total derivative of a level's cost before its update t, through the loops before it; and where it is taken.

        It is taken at an alias that these loops read, and that nothing before them has seen.

        Args:
            loop: the level's loop.
            t: the number of the update.

        Returns:
            The gradient and the parameters.

        Raises:
            EstimatorError: the level begins at solutions of levels below it.
        """
        name = loop.level
        begins = t == 0 and loop.steps > 0 and self.levels[name].init is not None
        if begins and loop.begins_before:
            self.begin(name)
        elif begins:
            raise EstimatorError(
                f"unrolled: level '{name}' begins at solutions of the levels below it (init=), which it cannot follow."
            )
        own = self.state.params[name]
        at = _own(own)
        self._put(name, at)
        for inner in loop.later if t else loop.first:
            self.run(inner)
        problem = self._problem(name)
        cost, aux = problem.cost(at, self._inputs(name), t)
        self._put(name, own)
        self.state = with_buffers(self.state, name, problem.after(aux, t)[0].fixed)
        return _gradient(cost, at), own

    def begin(self, name: str) -> None:
        """Take a level to where its inner loop begins."""
        standing = self.state.params[name], self.state.optimizer[name]
        self._put(name, *self._problem(name).start(self._inputs(name), *standing))

    def cut(self) -> None:
        """Forget how the levels came where they are."""
        params, optimizer = _tree.detach(self.state.params), _tree.detach(self.state.optimizer)
        self.state = replace(self.state, params=params, optimizer=optimizer)

    def _put(self, name: str, params: Tree, opt_state: Tree = None) -> None:
        optimizer = self.state.optimizer if opt_state is None else {**self.state.optimizer, name: opt_state}
        self.state = replace(self.state, params={**self.state.params, name: params}, optimizer=optimizer)

    def _problem(self, name: str) -> Problem:
        return bound(self.levels[name], self.feed, self.state, self.roles)

    def _inputs(self, name: str) -> dict[str, Tree]:
        return {source: self.state.params[source] for source in self.levels[name].reads_levels}


def _own(tree: Tree) -> Tree:
    """Aliases that only what follows reads."""
    return _tree.map(lambda x: x.view_as(x) if x.requires_grad else x.detach().requires_grad_(), tree)


def _gradient(cost: Tensor, at: Tree) -> Tree:
    leaves, structure = _tree.flatten(at)
    if not leaves or not cost.requires_grad:
        return _tree.zeros_like(at)
    grads = torch.autograd.grad(cost, leaves, create_graph=True, allow_unused=True)
    return _tree.unflatten(structure, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])


def _followed(level: Level, step: int) -> None:
    """Refuse a level whose loop is more than its updates."""
    what = None
    if step < level.warmup:
        what = f"a warm-up of {level.warmup - step} updates still due; make a step first"
    elif level.roll_back:
        what = "roll_back=True"
    elif level.has_solver:
        what = "an outside Solver in place of an optimizer"
    if what:
        raise EstimatorError(f"unrolled follows updates, and level '{level.name}' has {what}.")
