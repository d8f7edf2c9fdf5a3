"""Task levels: inner loops of independent tasks, each with its own step sizes, solved and answered for together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from funcmlo import _diff, _tracing, _tree, unroll
from funcmlo._norms import normalizes
from funcmlo._tree import Tree
from funcmlo.batches import forget
from funcmlo.chunks import Measured
from funcmlo.descent import Found, descend
from funcmlo.hypergrad.base import BestResponse, Requires
from funcmlo.hypergrad.solved import Keep, Solved, Standing
from funcmlo.hypergrad.stats import Stats
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.tasks import Slice, Tasks
from funcmlo.unroll import Passage, Recorded, Replayed

Answer: TypeAlias = tuple[Mapping[str, Tree], Any, Stats | Mapping[str, Any]]
"""Cotangents by input name, the estimator's new state, and stats."""


@dataclass(frozen=True)
class Together:
    """A level with tasks at its solution: all that it holds leads with the task axis.

    Attributes:
        problem: the level, bound.
        standing: where it stood before the loop.
        begin: where the loop began.
        end: where it ended.
        passages: what each step saw.
        inputs: the parameters of the levels that it reads.
        again: whether it is to be run again where an estimator asks for its trajectory.
        stays: the standings that were kept.
        whole: the loop of all tasks as one, if it was recorded.
    """

    problem: Problem
    standing: Standing
    begin: Standing
    end: Standing
    passages: Sequence[Passage]
    inputs: dict[str, Tree]
    again: bool = False
    stays: Mapping[int, Standing] | None = None
    whole: Solved | None = None

    @property
    def params(self) -> Tree:
        """The tasks' solutions."""
        return self.end[0]

    @property
    def opt_state(self) -> Tree:
        """The states of their optimizers there."""
        return self.end[1]

    def one(self, part: Slice) -> Solved:
        """Return one task at its solution."""
        tasks = self.problem.tasks
        assert tasks is not None
        taken: dict[int, Tree] = {}

        def own(trees: Mapping[str, Tree]) -> dict[str, Tree]:
            """One task's; what is one tree before stays one, as `hand_over` asks."""
            for name, tree in trees.items():
                if id(tree) not in taken:
                    taken[id(tree)] = part(tree) if name in tasks.sources else tree
            return {name: taken[id(tree)] for name, tree in trees.items()}

        inputs = own(self.inputs)
        passages = [Passage(own(p.inputs), part(p.correction), own(p.fixed)) for p in self.passages]
        single, standing = self.problem.one(part), part(self.standing)
        begin, end, stays = part(self.begin), part(self.end), part(dict(self.stays or {}))
        return unroll.hand_over(single, standing, begin, end, passages, inputs, again=self.again, stays=stays)

    def answer(
        self, estimator: BestResponse, ask: Callable[[Solved, Tree, Any], Answer], cotangent: Tree, state: Any
    ) -> Answer:
        """Ask an estimator for its product in every task.

        Args:
            estimator: the estimator.
            ask: `ask(solved, cotangent, state)` → its answer for one task.
            cotangent: a tree like the tasks' solutions.
            state: the estimator's states.

        Returns:
            The answer: cotangents of inputs that tasks share are added up, states and stats are the tasks'.
        """
        tasks, sharing = self.problem.tasks, self.problem.sharing
        assert tasks is not None
        if estimator.in_the_open and self.whole is not None:  # else the steps are made again, inside of the map
            products, new, stats = ask(self.whole, cotangent, state)
        else:
            products, new, stats = self._each(tasks, estimator, ask, cotangent, state)
        if sharing is not None and sharing.kind == "tasks":  # what all tasks read, those of other processes read too
            joint = {name: tree for name, tree in products.items() if name not in tasks.sources}
            products = {**products, **sharing.total(joint)}
        return products, new, stats

    def _each(
        self,
        tasks: Tasks,
        estimator: BestResponse,
        ask: Callable[[Solved, Tree, Any], Answer],
        cotangent: Tree,
        state: Any,
    ) -> Answer:
        """The same, by one question for each task."""
        kinds: list[type] = []

        def one(part: Slice) -> tuple[Tree, Tree]:
            products, new, stats = ask(self.one(part), part(cotangent), part(state))
            kinds[:] = [type(stats)]
            told = {f.name: getattr(stats, f.name) for f in fields(stats)} if isinstance(stats, Stats) else dict(stats)
            own = {name: tree for name, tree in products.items() if name in tasks.sources}
            return (own, new, told), {name: tree for name, tree in products.items() if name not in own}

        (own, new, told), shared = tasks.map(one)
        products = {**own, **shared}
        stats = Stats(**told) if issubclass(kinds[0], Stats) else told
        return {name: products[name] for name in self.inputs}, new, stats


def _normalizes(problem: Problem, standing: Standing, inputs: dict[str, Tree]) -> bool:
    """Whether a level's mapped gradients must not be differentiated from outside of the map."""
    if problem.level not in _NORMALIZING:
        tasks, first = problem.tasks, Slice(0, lambda x: x[0])
        assert tasks is not None
        one, own = problem.one(first), tasks.inputs(inputs, first)
        with torch.no_grad():
            _NORMALIZING[problem.level] = normalizes(lambda: one.cost(first(standing[0]), own, 0))
    return _NORMALIZING[problem.level]


_NORMALIZING: WeakKeyDictionary[Level, bool] = WeakKeyDictionary()


class Ran(NamedTuple):
    """A solved level, and its loop's costs (of tasks their mean), metrics, buffers and last gradient's norm."""

    solved: Solved | Together
    costs: list[Tensor]
    aux: Any
    after: dict[str, Tree]
    slope: Tensor | None


def hand_over(
    problem: Problem,
    standing: Standing,
    begin: Standing,
    end: Standing,
    passages: Sequence[Passage],
    inputs: dict[str, Tree],
    *,
    again: bool,
    stays: Mapping[int, Standing],
) -> Solved | Together:
    """Put a finished inner loop into the form that is asked for products, as `unroll.hand_over` does without tasks."""
    made = Together if problem.has_tasks else unroll.hand_over
    return made(problem, standing, begin, end, passages, inputs, again=again, stays=stays)


def run(
    problem: Problem,
    standing: Standing,
    inputs: dict[str, Tree],
    steps: int,
    requires: Requires = "solution",
    keep: Keep = Keep(),
    *,
    in_the_open: bool = False,
    wanted: bool = True,
    once: bool = False,
) -> Ran:
    """Run the inner loop of a level with no level below it, of all its tasks if it has some.

    Args:
        problem: the level, bound.
        standing: where the level stands.
        inputs: the parameters of the levels that it reads, plain values.
        steps: the number of updates; with 0 the level is taken to be solved where it stands.
        requires: what the estimators need of it.
        keep: which standings they want kept.
        in_the_open: whether one of them differentiates all tasks' steps through one graph.
        wanted: whether anybody asks for all steps' costs.
        once: whether one product alone will be asked of a recorded loop.

    Returns:
        The solved level and what else the loop leaves.
    """
    if not problem.has_tasks:
        alone = unroll.run(problem, standing, inputs, steps, requires, keep, wanted=wanted, once=once)
        return Ran(alone.solved, alone.costs, alone.aux, alone.after, alone.slope)
    # Two steps are timed: before the first one the tasks may stand at one point, where no map is asked anything.
    problem = _with_chunks(problem, standing, inputs, min(steps, 2), in_the_open=in_the_open)
    tasks = problem.tasks
    assert tasks is not None
    openly = in_the_open and steps > 0 and (tasks.at_once == 1 or not _normalizes(problem, standing, inputs))
    again = unroll.retraced(problem, standing, inputs, steps, keep, wanted=wanted) if openly else None
    if again is not None:
        at, passages = again.solved, unroll.passed(inputs, (), steps)
        end = at.params, at.opt_state
        together = Together(problem, standing, at.init, end, passages, inputs, True, at.kept, at)
        return Ran(together, [cost / tasks.n for cost in again.costs], again.aux, {}, again.slope)
    y, found, pullback = _made(problem, standing, inputs, steps, requires, keep, in_the_open=openly, once=once)
    for t in range(steps if requires == "solution" and not problem.level.roll_back else 0):
        forget(problem.feed, problem.first + t)
    passages = unroll.passed(inputs, found.seen, steps)
    begin, end, whole = found.begin, (y, found.opt_state), None
    if pullback is not None:
        whole = unroll.hand_over(problem, standing, begin, end, passages, inputs, stays=found.stays)
        whole = replace(whole, trajectory=Recorded(Replayed(whole), [pullback], once))
    solved = Together(problem, standing, begin, end, passages, inputs, requires == "trajectory", found.stays, whole)
    return Ran(solved, [cost.mean() for cost in found.costs], found.aux, found.after, found.slope)


def _made(
    problem: Problem,
    standing: Standing,
    inputs: dict[str, Tree],
    steps: int,
    requires: Requires,
    keep: Keep,
    *,
    in_the_open: bool,
    once: bool = False,
) -> tuple[Tree, Found, _diff.Pullback | None]:
    """The loop of all tasks; where its graph is good to be walked from outside, with the products by it."""
    tasks = problem.tasks
    assert tasks is not None

    def loop(inputs: dict[str, Tree]) -> tuple[Tree, Found]:
        def one(part: Slice) -> tuple[Tree, Found]:
            own = tasks.inputs(inputs, part)
            return descend(problem.one(part), part(standing), own, steps, requires, keep)

        y, found = tasks.values(one)
        return y, found

    if in_the_open:
        return _diff.vjp(loop, [inputs], once=once)
    with torch.no_grad():
        return *loop(inputs), None


def _with_chunks(problem: Problem, standing: Standing, inputs: dict[str, Tree], steps: int, *, in_the_open: bool) -> Problem:
    """The problem with the number of tasks that it evaluates at once, by measurement if that was asked."""
    # Two steps are made, since the tasks may stand at one point before the first one.
    tasks = problem.tasks
    assert tasks is not None
    if not isinstance(tasks.chunk, Measured) or not steps or _tracing.transforming():
        return problem
    leaves = _tree.leaves(standing[0])
    draws: Literal["same", "error"] = "same" if tasks.randomness == "same" else "error"

    def attempt(size: int) -> None:
        """A step or two of all tasks, and their derivative where the steps are differentiated."""
        tried = replace(problem, tasks=replace(tasks, chunk=size, randomness=draws))
        openly = in_the_open and (size == 1 or not _normalizes(problem, standing, inputs))
        y, _, pullback = _made(tried, standing, inputs, steps, "solution", Keep(), in_the_open=openly)
        if pullback is not None:
            pullback(y)

    sizes = tuple((x.shape, x.dtype, x.device) for x in leaves), steps, in_the_open
    chunk = tasks.chunk.choose(sizes, tasks.n, attempt, leaves[0].device if leaves else torch.device("cpu"))
    return replace(problem, tasks=replace(tasks, chunk=chunk))
