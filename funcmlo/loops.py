"""Walking a schedule: inner loops, updates and hypergradients, by the products along paths."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from funcmlo import _tracing, _tree, together
from funcmlo._tree import Tree
from funcmlo.batches import Feed, forget
from funcmlo.binding import bound, buffers, next_cost, with_buffers
from funcmlo.clock import Clock, timed
from funcmlo.finite import Event
from funcmlo.fold import Folded, total_gradient
from funcmlo.graph import Graph
from funcmlo.hypergrad.base import Requires
from funcmlo.hypergrad.solved import Keep, Solved, Standing, held
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.roles import Roles
from funcmlo.schedule import Loop, whole
from funcmlo.state import State
from funcmlo.together import Together
from funcmlo.unroll import Passage


@dataclass(frozen=True)
class Outcome:
    """What a level's last inner loop leaves for the metrics.

    Attributes:
        costs: its costs.
        aux: the last step's metrics.
        folded: its hypergradient.
        slope: the norm of its gradient.
        extent: how many examples it is about in this process.
    """

    costs: Sequence[Tensor]
    aux: Any
    folded: Folded | None = None
    slope: Tensor | None = None
    extent: int = 1


@dataclass
class Walk:
    """One call's work in progress: the state as it moves on, and what was solved on the way.

    Attributes:
        levels: the levels by name.
        graph: their graph.
        users: for each level, the levels that differentiate through it.
        several: the levels whose estimator states are kept by upper level.
        roles: what they have to do with tasks and with other processes.
        feeds: their batches.
        state: where the program stands.
        solved: each level's last inner loop.
        outcomes: what the metrics need of it.
        events: what is looked at for finiteness in the end.
        returning: where a level with `roll_back=True` will return to: its loop, and its standing, buffers and step then.
        clock: how long each level takes.
        wanted: whether anybody asks for the costs of all inner steps.
    """

    levels: Mapping[str, Level]
    graph: Graph
    users: Mapping[str, Sequence[str]]
    several: Set[str]
    roles: Roles
    feeds: Mapping[str, Feed]
    state: State
    solved: dict[str, Solved | Together] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    returning: dict[str, tuple[Loop, Standing, Tree, int]] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    wanted: bool = True

    def run(self, loop: Loop) -> None:
        """Run an inner loop, with what is due before it: its level's roll-back, and its warm-up."""
        name = loop.level
        level = self.levels[name]
        if self._roll_back(name):
            loop = whole(loop, loop.steps)  # no level below has run since this one's last update
        if self.state.step[name] < level.warmup:
            self._loop(name, replace(loop, steps=level.warmup - self.state.step[name]), "solution")
            loop = whole(loop, loop.steps)
        if level.roll_back:
            self.returning[name] = (loop, self._standing(name), self.state.buffers[name], self.state.step[name])
        self._loop(name, loop, self._requires(name), self._keep(name, loop.steps))

    def finish(self) -> None:
        """Make the roll-backs that are still due, the highest level's first: it runs those below it."""
        for name in reversed(self.graph.levels):
            self._roll_back(name)

    def begin(self, name: str) -> None:
        """Take a level to where its inner loop begins."""
        self._put(name, self.problem(name).start(self._inputs(name), *self._standing(name)))

    def hypergradient(self, name: str, loop: Loop | None, solved: Sequence[str]) -> Folded:
        """Return the total gradient of a level at its next step; nothing is updated.

        Args:
            name: the level.
            loop: the loop whose first step that is; without one the level and those below are taken where they stand.
            solved: the levels that are then taken to be solved.

        Returns:
            The total gradient.
        """
        self._arrive(name, loop)
        for lower in solved if loop is None else ():
            self.solved[lower] = together.run(self.problem(lower), self._standing(lower), self._inputs(lower), 0).solved
        folded = self._fold(self.problem(name), 0)
        self._note(name, [folded.cost], None, folded)
        return folded

    def cost(self, name: str, loop: Loop | None) -> Tensor:
        """Return the cost of a level at its next step, as its optimizer sees it; nothing is updated.

        Args:
            name: the level.
            loop: the loop whose first step that is; without one all levels are taken where they stand.

        Returns:
            The cost.
        """
        self._arrive(name, loop)
        cost = next_cost(self.problem(name), self.state.params[name], self._inputs(name))
        self._note(name, [cost], None, None)
        return cost

    def problem(self, name: str) -> Problem:
        """Return a level with its batches and its randomness bound, at its next step."""
        return bound(self.levels[name], self.feeds, self.state, self.roles)

    def _arrive(self, name: str, loop: Loop | None) -> None:
        """Take a level to the first update of its loop: where it begins, the levels below solved."""
        if loop is not None and loop.steps and loop.begins_before:
            self.begin(name)
        for inner in loop.first if loop is not None else ():
            self.run(inner)
        if loop is not None and loop.steps and not loop.begins_before:
            self.begin(name)

    @timed
    def _loop(self, name: str, loop: Loop, requires: Requires, keep: Keep = Keep()) -> None:
        problem, standing = self.problem(name), self._standing(name)
        forget(problem.feed, problem.first)
        if loop.first or loop.later or name in self.graph.tops:  # a top level's gradient is told in the metrics
            self._interleaved(loop, problem, standing, requires, keep)
            return
        openly = any(self.levels[name].response_for(user).in_the_open for user in self.users[name])
        run = together.run(
            problem,
            standing,
            self._inputs(name),
            loop.steps,
            requires,
            keep,
            in_the_open=openly,
            wanted=self.wanted,
            once=len(self.users[name]) == 1,
        )
        self.solved[name] = run.solved
        self._put(name, (run.solved.params, run.solved.opt_state), loop.steps, run.after)
        extent = problem.extent(loop.steps - 1) if loop.steps else 1
        self._note(name, run.costs, run.solved.params, None, run.aux, run.slope, extent)

    def _interleaved(self, loop: Loop, problem: Problem, standing: Standing, requires: Requires, keep: Keep) -> None:
        """The loop of a level with levels below it: their loops before each update, a hypergradient for each update."""
        name = loop.level
        if loop.begins_before and loop.steps:
            self.begin(name)
        for inner in loop.first:
            self.run(inner)
        if loop.steps and not loop.begins_before:
            self.begin(name)
        inputs, begin = self._inputs(name), self._standing(name)
        passages: list[Passage] = []
        costs, stays = list[Tensor](), dict[int, Standing]()
        for t in range(loop.steps):
            for inner in loop.later if t else ():
                self.run(inner)
            inputs = self._inputs(name)
            if t in keep.before:
                stays[t] = held(self._standing(name), keep.on_cpu)
            problem = replace(problem, fixed=buffers(problem.level, self.state))
            cost, indirect = self._update(problem, inputs, t, costs)
            costs.append(cost)
            if requires != "solution" or t in keep.before or t == loop.steps - 1:  # only then is it run again
                passages.append(Passage(inputs, indirect, problem.fixed))
            elif not problem.level.roll_back:
                forget(problem.feed, problem.first + t)
        end = self._standing(name)
        self._put(name, end, loop.steps)
        passages = [Passage(inputs)] * (loop.steps - len(passages)) + passages
        again = requires == "trajectory"
        self.solved[name] = together.hand_over(problem, standing, begin, end, passages, inputs, again=again, stays=stays)

    def _update(
        self, problem: Problem, inputs: dict[str, Tree], t: int, costs: Sequence[Tensor]
    ) -> tuple[Tensor, Tree | None]:
        """Make step t of a level with levels below it; return its cost and the indirect part of its hypergradient."""
        name = problem.level.name
        if problem.level.has_solver:
            params, opt_state, cost, aux = problem.update(*self._standing(name), inputs, t)
            folded = None
        else:
            folded = self._fold(problem, t)
            params, opt_state = problem.apply(*self._standing(name), inputs, folded.gradient, t)
            cost, aux = folded.cost, folded.aux
        after, aux = problem.after(aux, t)
        self._put(name, (params, opt_state), fixed=after.fixed)
        if problem.tasks is not None and problem.has_tasks:
            cost = cost / problem.tasks.n  # the metrics tell their mean
        self._note(name, [*costs, cost], params, folded, aux, extent=problem.extent(t))
        return cost, folded.indirect if folded else None

    def _fold(self, problem: Problem, t: int) -> Folded:
        k = problem.level.name
        solved = {name: (self.levels[name].response_for(k), self.solved[name]) for name in self.graph.responding(k)}
        kept = self.state.response
        states = {name: kept[name][k] if name in self.several else kept[name] for name in solved}
        folded = total_gradient(self.graph, problem, self.state.params, solved, states, t)
        new = {n: {**kept[n], k: state} if n in self.several else state for n, state in folded.response.items()}
        self.state = replace(self.state, response={**kept, **new})
        return folded

    def _roll_back(self, name: str) -> bool:
        """Return a level to where its last inner loop began and make one update there, if that is due."""
        if name not in self.returning:
            return False
        loop, standing, held_then, step = self.returning.pop(name)
        then = {**self.state.step, name: step}
        self.state = replace(self.state, step=then, buffers={**self.state.buffers, name: held_then})
        self._put(name, standing)
        told = self.outcomes[name]
        self._loop(name, whole(loop, 1), "solution")
        self.outcomes[name] = told  # the metrics are those of the look-ahead
        return True

    def _requires(self, name: str) -> Requires:
        """What the estimators of the levels above need of a level's inner loop."""
        asked = {self.levels[name].response_for(upper).requires for upper in self.users[name]}
        return next((kind for kind in _STRONGEST_FIRST if kind in asked), "solution")

    def _keep(self, name: str, steps: int) -> Keep:
        """The standings of a level's inner loop that the estimators of the levels above want kept."""
        wanted = (self.levels[name].response_for(upper).keep(steps) for upper in self.users[name])
        return functools.reduce(operator.or_, wanted, Keep())

    def _inputs(self, name: str) -> dict[str, Tree]:
        return {source: self.state.params[source] for source in self.levels[name].reads_levels}

    def _standing(self, name: str) -> Standing:
        return self.state.params[name], self.state.optimizer[name]

    def _put(self, name: str, standing: Standing, steps: int = 0, fixed: Mapping[str, Any] | None = None) -> None:
        """Move a level on."""
        self.state = replace(
            self.state if fixed is None else with_buffers(self.state, name, fixed),
            params={**self.state.params, name: standing[0]},
            optimizer={**self.state.optimizer, name: standing[1]},
            step={**self.state.step, name: self.state.step[name] + steps},
        )

    def _note(
        self,
        name: str,
        costs: Sequence[Tensor],
        params: Tree,
        folded: Folded | None,
        aux: Any = None,
        slope: Tensor | None = None,
        extent: int = 1,
    ) -> None:
        """Keep what the metrics and the check of finiteness need, and nothing that holds a loop's memory."""
        slope = slope if folded is None else _tree.norm(folded.gradient)
        self.outcomes[name] = Outcome(costs, aux, folded, slope, extent)
        if _tracing.unreadable():
            return
        moved = None if params is None else _tree.finite(params)
        if folded is None:
            self.events.append(Event(name, costs, moved))
        else:
            self.events.append(Event(name, costs[-1:], moved, _tree.finite(folded.gradient), folded.plain_stats()))


_STRONGEST_FIRST: tuple[Requires, ...] = ("trajectory", "replay", "solution")
