"""The total derivative of any hierarchy: solutions as nodes of the graph, inside each other.

A level's total cost is its cost with the levels below at their solutions,

    T_k(θ_k, uppers) = C_k(θ_k, uppers, θ*_l(…)),    θ*_l = argmin T_l,

and its hypergradient is ∇T_k. A lower solution enters as a node whose derivative is a best response for T_l, with all
that T_l holds in turn; `ITD` enters as its inner steps themselves. Whoever evaluates a total cost away from a
known solution solves again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _diff, _tracing, _tree, precision
from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.binding import advanced, bound, next_cost, put, with_buffers
from funcmlo.clock import Clock, timed
from funcmlo.dependence import Dependence
from funcmlo.errors import EstimatorError
from funcmlo.finite import Event
from funcmlo.fold import Folded
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.itd import NO_STEPS
from funcmlo.hypergrad.solved import Solved, Standing
from funcmlo.hypergrad.stats import Stats
from funcmlo.level import Level
from funcmlo.loops import Outcome
from funcmlo.problem import Problem
from funcmlo.roles import Roles
from funcmlo.schedule import Loop
from funcmlo.solution import SolutionMap
from funcmlo.state import State
from funcmlo.unroll import hand_over

Values = dict[str, Tree]
"""Parameters by level name, some of them being differentiated."""


@dataclass
class Nest:
    """One call's work in progress, with total derivatives.

    Attributes:
        levels: the levels by name.
        needs: what their total costs need.
        below: for each level, the levels whose loops run before its updates, the highest first.
        roles: what they have to do with tasks, which are solved as one problem here, and with other processes.
        feeds: their batches.
        state: where the program stands.
        solve: whether inner loops run; else the state's parameters are the solutions.
        outcomes: what the metrics need of each level's last inner loop.
        events: what is looked at for finiteness in the end.
        clock: how long each level takes.
    """

    levels: Mapping[str, Level]
    needs: Dependence
    below: Mapping[str, Sequence[str]]
    roles: Roles
    feeds: Mapping[str, Feed]
    state: State
    solve: bool = True
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    _told: dict[str, Any] = field(default_factory=dict)
    _again: bool = False
    """Whether a solution is being solved for again inside a backward pass, of which nothing is kept."""

    def run(self, loop: Loop) -> None:
        """Run a level's loop, with all that runs before its updates."""
        _, self.state = self._loop(loop.level, {}, self.state)

    def begin(self, name: str) -> None:
        """Take a level to where its inner loop begins."""
        self.state = self._begun(name, {}, self.state)

    def hypergradient(self, name: str, *, begin: bool) -> Folded:
        """Return ∇T_k of a level at its next step, where its loop begins or where it stands; nothing is updated."""
        if begin:
            self.begin(name)
        folded, _, _ = self._gradient(name, {}, self.state, 0)
        self._note(name, [folded.cost], None, folded)
        return folded

    def cost(self, name: str, *, begin: bool) -> Tensor:
        """Return the cost of a level at its next step, as its optimizer sees it; nothing is updated."""
        if begin:
            self.begin(name)
        values, state = self._solved_below(name, self.state.params[name], {}, self.state)
        cost = next_cost(self._problem(name, self.state), values[name], self._inputs(name, values, state))
        self._note(name, [cost], None, None)
        return cost

    def _gradient(self, k: str, values: Values, state: State, t: int) -> tuple[Folded, State, Values]:
        """∇T_k at step t of its loop, the state with the levels below where their loops ended, and their solutions."""
        outer = self._told
        told: dict[str, Any] = {}
        reached: list[tuple[State, Values]] = []

        def cost(own: Tree) -> tuple[Tensor, Any]:
            value, aux, after, at = self._total(k, own, values, state, t)
            reached.append((after, {name: at[name] for name in self.below[k]}))
            self._told = told  # what follows is the backward pass
            return value, aux

        with precision.scaled(self.levels[k].loss_scale):
            value, aux, (gradient,), _ = _diff.value_and_grads(cost, [state.params[k]])
        self._told = outer
        after, solutions = reached[-1]
        if not torch.is_grad_enabled():  # no one differentiates this update, so nothing holds on to its graph
            under = self._under(k)
            params = {n: _tree.detach(tree) if n in under else tree for n, tree in after.params.items()}
            optimizer = {n: _tree.detach(tree) if n in under else tree for n, tree in after.optimizer.items()}
            after, solutions = replace(after, params=params, optimizer=optimizer), _tree.detach(solutions)
        return Folded(gradient, None, value, aux, {}, told), after, solutions

    def _total(
        self, k: str, own: Tree, values: Values, state: State, t: int, known: State | None = None
    ) -> tuple[Tensor, Any, State, Values]:
        """T_k at a point, the levels below solved there from `state` on, or solved already in `known`."""
        values, state = self._solved_below(k, own, values, state, known)
        value, aux = self._problem(k, state).cost(own, self._inputs(k, values, state), t)
        return value, aux, state, values

    def _solved_below(
        self, k: str, own: Tree, values: Values, state: State, known: State | None = None
    ) -> tuple[Values, State]:
        """A level's parameters with the solutions below it, and the state after those loops."""
        values = {**values, k: own}
        for name in self.below[k]:
            needed = name in self.needs.needed[k]
            values[name], state = self._solution(name, k if needed else None, values, state, known)
        return values, state

    def _solution(
        self, name: str, user: str | None, values: Values, state: State, known: State | None
    ) -> tuple[Tree, State]:
        """A level's solution as a function of the levels above it, and the state after its loop."""
        above = {parent: values.get(parent, state.params[parent]) for parent in self.needs.parents[name]}
        level = self.levels[name]
        if user is None:  # nothing is read of it now, but where ITD's next loop begins follows from this one
            response: BestResponse | None = next(
                (r for r in level.responses if r.in_the_open and self.solve and level.steps), None
            )
        else:
            response = level.response_for(user)
        if (
            response is not None and response.in_the_open and _tracing.recording(values)
        ):  # the loops inside it may follow from more than it does
            if not self.solve or not level.steps:
                raise EstimatorError(NO_STEPS)
            return self._loop(name, values, state)
        if known is None:
            with torch.no_grad():
                y, state = self._loop(name, _tree.detach(values), state)
        else:
            y, state = known.params[name], known
        if response is None or not _tracing.recording(above):
            return y, state
        return self._attached(name, response, y, above, state), state

    def _attached(self, name: str, response: BestResponse, y: Tree, above: Values, state: State) -> Tree:
        """A known solution as a node of the graph, whose derivative is the response for T_l."""
        begin = self._rewound(name, state)  # so that solving again draws no new batches
        solved_below: list[State] = []

        def total(at: Tree, x: Values, draw: int | None = None) -> Tensor:
            last = -1 if state.step[name] else 0
            t = last if draw is None else draw
            outer, self._again = self._again, True
            try:
                if not (_same(at, y) and _same(x, above)):
                    return self._total(name, at, x, begin, t)[0]
                if not solved_below:
                    with torch.no_grad():
                        solved_below.append(self._total(name, _tree.detach(at), _tree.detach(x), begin, t)[2])
                return self._total(name, at, x, begin, t, solved_below[0])[0]
            finally:
                self._again = outer

        def at(constants: Tree, x: Values, y: Tree) -> Solved:
            del constants
            standing = y, state.optimizer[name]
            solved = hand_over(self._problem(name, state), standing, standing, standing, [], x)
            return replace(solved, loss=total)

        def tell(stats: Stats) -> None:
            self._told[name] = stats.plain() + self._told[name] if name in self._told else stats.plain()

        node = SolutionMap(f"level '{name}'", response, lambda constants, init, x: _tree.map(torch.clone, y), at, tell)
        return node((), (), above)

    @timed
    def _loop(self, name: str, values: Values, state: State) -> tuple[Tree, State]:
        """A level's inner loop: each update with the gradient of its total cost."""
        level, first = self.levels[name], state.step[name]
        steps = level.steps if self.solve else 0
        warming = max(0, level.warmup - first) if self.solve and not self._again else 0
        if steps:
            state = self._begun(name, values, state)
        elif self.solve and not warming:  # solved where it stands, so that the levels below are solved there
            here = {**values, name: state.params[name]}
            for lower in self.below[name]:
                here[lower], state = self._solution(lower, None, here, state, None)
        costs: list[Tensor] = []
        for t in range(warming + steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= warming):
                state, cost = self._updated(name, values, state, t, costs)
            costs.append(cost)
        return state.params[name], advanced(state, name, warming + steps)

    def _updated(self, name: str, values: Values, state: State, t: int, costs: Sequence[Tensor]) -> tuple[State, Tensor]:
        problem = self._problem(name, state)
        folded = None
        if self.levels[name].has_solver:
            _, _, after, at = self._total(name, state.params[name], values, state, t)
            inputs = self._inputs(name, at, after)
            *standing, cost, aux = problem.update(*_standing(name, after), inputs, t)
        else:
            folded, after, solutions = self._gradient(name, values, state, t)
            inputs = self._inputs(name, {**values, **solutions}, after)
            standing = list(problem.apply(*_standing(name, after), inputs, folded.gradient, t))
            cost, aux = folded.cost, folded.aux
        moved, aux = self._problem(name, after).after(aux, t)
        if not self._again:
            self._note(name, [*costs, cost], standing[0], folded, aux, problem.extent(t))
        after = with_buffers(after, name, moved.fixed)
        return put(after, name, (standing[0], standing[1])), cost

    def _begun(self, name: str, values: Values, state: State) -> State:
        """The state with a level where its inner loop begins; its start may read solutions below it."""
        level = self.levels[name]
        if level.init is None:
            return state
        here = {**values, name: state.params[name]}
        if any(source in self.below[name] for source in level.start_levels):
            here, state = self._solved_below(name, state.params[name], values, state)
        start = self._problem(name, state).start(self._inputs(name, here, state), *_standing(name, state))
        return put(state, name, start)

    def _rewound(self, name: str, state: State) -> State:
        """The state with the step counters of all levels under one back by a loop."""
        under = self._under(name)
        step = {n: max(0, t - self.levels[n].steps) if n in under else t for n, t in state.step.items()}
        return replace(state, step=step)

    def _under(self, name: str) -> set[str]:
        """All levels that run before a level's update, and before theirs."""
        under: set[str] = set()
        waiting = list(self.below[name])
        while waiting:
            lower = waiting.pop()
            if lower not in under:
                under.add(lower)
                waiting += self.below[lower]
        return under

    def _problem(self, name: str, state: State) -> Problem:
        return bound(self.levels[name], self.feeds, state, self.roles)

    def _inputs(self, name: str, values: Values, state: State) -> Values:
        return {source: values.get(source, state.params[source]) for source in self.levels[name].reads_levels}

    def _note(
        self, name: str, costs: Sequence[Tensor], params: Tree, folded: Folded | None, aux: Any = None, extent: int = 1
    ) -> None:
        """Keep what the metrics and the check of finiteness need."""
        costs = [cost.detach() for cost in costs]
        if folded is None:
            self.outcomes[name] = Outcome(costs, aux, extent=extent)
            self.events.append(Event(name, costs[-1:], None if params is None else _tree.finite(params)))
            return
        folded = replace(folded, gradient=_tree.detach(folded.gradient), cost=costs[-1], aux=_tree.detach(folded.aux))
        # As along paths: told for levels that others run for, and for top levels, which run for no one.
        alone = not any(name in below for below in self.below.values())
        told = folded if self.below[name] or alone else None
        self.outcomes[name] = Outcome(costs, folded.aux, told, _tree.norm(folded.gradient), extent)
        flags = None if params is None else _tree.finite(params), _tree.finite(folded.gradient)
        self.events.append(Event(name, costs[-1:], *flags, folded.stats))


def _standing(name: str, state: State) -> Standing:
    return state.params[name], state.optimizer[name]


def _same(a: Tree, b: Tree) -> bool:
    """Whether two trees of one structure hold the same numbers; aliases are told at once."""
    pairs = zip(_tree.leaves(a), _tree.leaves(b), strict=True)
    return all((x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y) for x, y in pairs)
