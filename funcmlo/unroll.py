"""Inner loops handed over as a solved level: recorded, or to be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _diff, _random, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.descent import Found, descend
from funcmlo.hypergrad.base import Requires
from funcmlo.hypergrad.solved import Keep, Parts, Solved, Standing
from funcmlo.problem import Problem
from funcmlo.replaying.second import products
from funcmlo.replaying.trajectory import Pull
from funcmlo.replaying.trajectory import loop as trajectory_of
from funcmlo.signature import Call


@dataclass(frozen=True)
class Run:
    """What an inner loop gave: the solved level, and its costs for the metrics.

    Attributes:
        solved: the level at its solution.
        costs: the cost before each inner step, as the optimizer saw it.
        aux: the last step's metrics.
        after: the level's buffers after the last step; empty without any.
        slope: the norm of the last step's gradient, if there is one.
    """

    solved: Solved
    costs: list[Tensor]
    aux: Any
    after: dict[str, Tree]
    slope: Tensor | None


@dataclass(frozen=True)
class Passage:
    """What one inner step saw besides the level's own state.

    Attributes:
        inputs: the parameters of the levels that it reads; those of lower levels differ from step to step.
        correction: what the levels below added to the step's gradient (the level's hypergradient less its direct
            gradient), which the level's own best response takes to be constant; None for nothing.
        fixed: what the loss read as constants and moves on, such as its buffers before the step.
    """

    inputs: dict[str, Tree]
    correction: Tree = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """A trajectory that is run again where its states or its derivative are asked for: the same start, the same bits."""

    solved: Solved = field(repr=False)

    @property
    def states(self) -> tuple[Standing, ...]:
        """The standings before the first step and after each one."""
        states = [self.solved.init]
        with torch.no_grad():
            for t in range(self.solved.steps):
                states.append(self.solved.update(*states[-1], self.solved.inputs, t))
        return tuple(states)

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input."""

        def loop(inputs: dict[str, Tree]) -> tuple[Tree, None]:
            y, s = self.solved.start(inputs)
            for t in range(self.solved.steps):
                y, s = self.solved.update(y, s, inputs, t)
            return y, None

        products: dict[str, Tree] = _diff.with_vjp(
            loop, [self.solved.inputs], lambda _, __, pullback: dict(pullback(cotangent)[0])
        )
        return products


@dataclass(frozen=True)
class Recorded:
    """A trajectory with the graph of its steps, which is let go as it is walked where one level alone asks."""

    again: Replayed
    _pullbacks: list[_diff.Pullback] = field(repr=False)
    _once: bool = False

    @property
    def states(self) -> tuple[Standing, ...]:
        """The standings before the first step and after each one."""
        return self.again.states

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input."""
        if not self._pullbacks or (self._once and _tracing.recording(cotangent)):
            return self.again.pullback(cotangent)
        (inputs,) = (self._pullbacks.pop() if self._once else self._pullbacks[0])(cotangent)
        return dict(inputs)


@dataclass(frozen=True)
class Retraced:
    """A trajectory whose steps were replayed; they are run again as they are written where its answer is differentiated."""

    again: Replayed
    _pull: Pull = field(repr=False)

    @property
    def states(self) -> tuple[Standing, ...]:
        """The standings before the first step and after each one."""
        return self.again.states

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input."""
        if _tracing.transforming() or _tracing.recording(cotangent):
            return self.again.pullback(cotangent)
        return self._pull(cotangent)


def run(
    problem: Problem,
    standing: Standing,
    inputs: dict[str, Tree],
    steps: int,
    requires: Requires = "solution",
    keep: Keep = Keep(),
    *,
    wanted: bool = True,
    once: bool = False,
) -> Run:
    """Run the inner loop of a level with no level below it, and hand over its solution.

    Args:
        problem: the level, bound.
        standing: where the level stands.
        inputs: the parameters of the levels that it reads, plain values.
        steps: the number of updates; with 0 the level is taken to be solved where it stands.
        requires: what the estimators need of it; for `"trajectory"` the loop is recorded.
        keep: which standings they want kept.
        wanted: whether anybody asks for all steps' costs.
        once: whether one product alone will be asked of a recorded loop, which then lets go of its graph.

    Returns:
        The solved level.
    """
    pullback: _diff.Pullback | None = None
    if requires == "trajectory" and (again := retraced(problem, standing, inputs, steps, keep, wanted=wanted)) is not None:
        return again
    if requires == "trajectory" and steps:
        end, found, pullback = _diff.vjp(recorded(problem, standing, steps, keep), [inputs], once=once)
    else:
        with torch.no_grad():
            end, found = descend(problem, standing, inputs, steps, requires, keep, wanted=wanted)
    passages = passed(inputs, found.seen, steps)
    finish = (end, found.opt_state)
    solved = hand_over(problem, standing, found.begin, finish, passages, inputs, stays=found.stays)
    if pullback is not None:
        solved = replace(solved, trajectory=Recorded(Replayed(solved), [pullback], once))
    return Run(solved, found.costs, found.aux, found.after, found.slope)


def retraced(
    problem: Problem, standing: Standing, inputs: dict[str, Tree], steps: int, keep: Keep, *, wanted: bool = True
) -> Run | None:
    """Run an inner loop, of all tasks together if there are some, by replaying its steps.

    Args:
        problem: the level, bound.
        standing: where it stands.
        inputs: the parameters of the levels that it reads.
        steps: the number of updates.
        keep: which standings are kept.
        wanted: whether anybody asks for all steps' costs.

    Returns:
        What it gave, of tasks the sums of their costs and all their gradients' norms; None where it cannot be replayed.
    """
    again = trajectory_of(problem, standing, inputs, steps, keep, wanted=wanted)
    if again is None:
        return None
    passages = passed(inputs, (), steps)
    plain = hand_over(problem, standing, again.begin, again.end, passages, inputs, stays=again.stays)
    solved = replace(plain, trajectory=Retraced(Replayed(plain), again.pull))
    slope = torch.func.vmap(_tree.norm)(again.gradient) if problem.has_tasks else _tree.norm(again.gradient)
    return Run(solved, again.costs, again.aux, {}, slope)


def recorded(
    problem: Problem, standing: Standing, steps: int, keep: Keep
) -> Callable[[dict[str, Tree]], tuple[Tree, Found]]:
    """Return the inner loop as a function of the inputs, to be recorded."""
    return lambda inputs: descend(problem, standing, inputs, steps, "trajectory", keep)


def passed(inputs: dict[str, Tree], seen: Sequence[dict[str, Tree]], steps: int) -> list[Passage]:
    """Return what each step of a loop saw, all of them these inputs, and the buffers that `descend` tells."""
    passages = [Passage(inputs, fixed=before) for before in seen]
    return [passages[0] if passages else Passage(inputs)] * (steps - len(passages)) + passages


def hand_over(
    problem: Problem,
    standing: Standing,
    begin: Standing,
    end: Standing,
    passages: Sequence[Passage],
    inputs: dict[str, Tree],
    *,
    again: bool = False,
    stays: Mapping[int, Standing] | None = None,
) -> Solved:
    """Put a finished inner loop into the form that estimators see.

    Args:
        problem: the level, bound.
        standing: where the level stood before the loop.
        begin: where the loop began.
        end: where it ended.
        passages: what each step saw.
        inputs: the inputs at the last step.
        again: whether it is to be run again where an estimator asks for its trajectory.
        stays: the standings that were kept.

    Returns:
        The solved level.
    """
    steps = len(passages)
    # Without inner steps the last step ever made is the one whose batch and randomness are bound.
    last = steps - 1 if steps else (-1 if problem.first else 0)

    def then(t: int) -> Problem:
        """The level with its buffers as they were before step t."""
        fixed = passages[t].fixed if passages else None
        return replace(problem, fixed={**problem.fixed, **fixed}) if fixed else problem

    def seen(x: dict[str, Tree], t: int | None) -> dict[str, Tree]:
        """The inputs of step t, moved as x is moved away from the last step's: exactly theirs at x = inputs."""
        own = passages[t].inputs if passages and t is not None else inputs
        return {
            name: tree if own[name] is inputs[name] else _tree.add(own[name], _tree.subtract(tree, inputs[name]))
            for name, tree in x.items()
        }

    def loss(at: Tree, x: dict[str, Tree], draw: int | None = None) -> Tensor:
        return then(last).cost(at, x, last if draw is None else last + 1 + draw)[0]

    def number(t: int | None) -> int:
        return last if t is None else t

    def correction(t: int | None) -> Tree:
        return passages[number(t)].correction if passages else None

    def update(at: Tree, state: Tree, x: dict[str, Tree], t: int | None = None) -> Standing:
        return then(number(t)).update(at, state, seen(x, t), number(t), correction(t))[:2]

    def updates(at: Tree, state: Tree, x: dict[str, Tree], gradient: Tree, t: int | None) -> tuple[Tree, Tree]:
        whole = gradient if correction(t) is None else _tree.add(gradient, correction(t))
        return problem.updates(at, state, seen(x, t), whole)

    def evaluate(call: Call, first: Tree, x: dict[str, Tree], draw: int | None = None, *, is_cost: bool = False) -> Any:
        return then(last).evaluate(call, first, x, last if draw is None else last + 1 + draw, is_cost=is_cost)

    parts = Parts(
        cost=lambda at, x, t: then(number(t)).cost(at, seen(x, t), number(t))[0],
        updates=updates,
        excess=lambda at, x, t: problem.excess(at, seen(x, t), number(t)),
        correction=correction(None),
    )
    solved = Solved(
        params=end[0],
        opt_state=end[1],
        inputs=inputs,
        init=begin,
        steps=steps,
        loss=loss,
        update=update,
        start=lambda x: problem.start(seen(x, 0), *standing),
        optimizer=problem.optimizer(inputs),
        parts=None if problem.level.has_solver else parts,
        evaluate=evaluate,
        kept=stays or {},
        cost_inputs=problem.level.cost_levels,
        autocast=problem.level.autocast,
        loss_scale=problem.level.loss_scale,
        sharing=problem.sharing,
        products=lambda: products(then(last), end[0], inputs, last),
        seed=_random.step_seed(problem.seed, f"{problem.level.name}.response", problem.first + last),
    )
    return replace(solved, trajectory=Replayed(solved)) if again and steps else solved
