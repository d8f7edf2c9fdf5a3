"""Another estimator put into a program, and a watch on what an estimator is asked and answers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.errors import FuncmloWarning
from funcmlo.hypergrad.base import BestResponse, Claims
from funcmlo.hypergrad.solved import Keep, Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.initial import estimator_state
from funcmlo.level import Level
from funcmlo.loops import Walk
from funcmlo.schedule import Loop
from funcmlo.state import State


@dataclass(frozen=True)
class Answer:
    """A hypergradient, the stats of its best-response products by level, and the seconds of the whole call."""

    gradient: Tree
    stats: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Place:
    """Where estimators are put: the response, for level `of`, of the levels `through`.

    Attributes:
        program: the program, a `Multilevel`.
        of: the level whose hypergradient is taken.
        through: the levels whose response is replaced; what levels other than `of` see of them stays.
    """

    program: Any
    of: str
    through: tuple[str, ...]

    def users(self, name: str) -> tuple[str, ...]:
        """Return the levels that differentiate through a level."""
        users: tuple[str, ...] = self.program._plan.users[name]
        return users

    def put(self, estimator: BestResponse, longer: int = 1, *, warn: bool = False) -> Any:
        """Return the program with another estimator.

        Args:
            estimator: takes the place of the response of every level of `through`.
            longer: by how much their inner loops are longer.
            warn: whether to warn of what is probably not meant with it.

        Returns:
            A program of its own.
        """

        def level(given: Level) -> Level:
            if given.name not in self.through:
                return given
            users = self.users(given.name)
            others = {user: given.response_for(user) for user in users if user != self.of}
            response = {**others, self.of: estimator} if others else estimator
            return replace(given, response=response, steps=given.steps * longer)

        with warnings.catch_warnings():
            if not warn:
                warnings.simplefilter("ignore", FuncmloWarning)
            return type(self.program)(*map(level, self.program.levels), composition=self.program.composition)

    def start(self, state: State, estimator: BestResponse) -> State:
        """Return the state with an estimator's first state where the old estimator's was."""
        response = dict(state.response)
        for name in self.through:
            fresh = estimator_state(estimator, state.params[name], self.program._plan.roles.tasks.get(name))
            several = len(self.program._plan.keepers[name]) > 1
            response[name] = {**state.response[name], self.of: fresh} if several else fresh
        return replace(state, response=response)

    def run(
        self,
        estimator: BestResponse,
        state: State,
        batches: Mapping[str, Any],
        *,
        solve: bool = True,
        longer: int = 1,
        warn: bool = False,
    ) -> Answer:
        """Take the hypergradient with an estimator.

        Args:
            estimator: takes the place of the response of every level of `through`.
            state: where the program stands.
            batches: its batches.
            solve: whether the inner loops run first.
            longer: by how much they are longer.
            warn: whether to warn of what the program with it probably does not mean.

        Returns:
            What came out.
        """
        program, fresh = self.put(estimator, longer, warn=warn), self.start(state, estimator)
        begin = now()
        gradient, stats = program.hypergradient(fresh, batches, of=self.of, solve=solve, with_stats=True)
        return Answer(gradient, {name: found for name, found in stats.items() if name in self.through}, now() - begin)

    def reached(self, state: State, batches: Mapping[str, Any], longer: int = 1) -> State:
        """Return the state at which the hypergradient is taken: the inner loops have run, level `of` is about to step.

        Args:
            state: where the program stands.
            batches: its batches.
            longer: by how much the inner loops of the levels `through` are longer.

        Returns:
            The state; `solve=False` from there gives the same inner problems, batches and draws.
        """
        nothing = Nothing()
        program = self.put(nothing, longer)
        before, own = program._plan.schedule.before(self.of)
        loops = [item for item in (*before, *own.first) if isinstance(item, Loop)]
        solved = [name for name in program.graph.levels if self.of in program._plan.users[name]]
        running = {self.of, *solved}.union(*(loop.levels() for loop in loops))
        work: Walk | Any = program._plan.begin(running, self.start(state, nothing), batches, pure=True)
        with torch.no_grad():
            for item in before:
                work.begin(item) if isinstance(item, str) else work.run(item)
            if isinstance(work, Walk):
                work.hypergradient(self.of, own, solved)
                return work.state
            if own.steps:
                work.begin(self.of)
            ready: State = work._gradient(self.of, {}, work.state, 0)[1]
            return ready


@dataclass(frozen=True)
class Nothing(BestResponse):
    """Jᵀv ≈ 0 at no cost: what is left of a hypergradient call is what all estimators share."""

    claims: ClassVar[Claims] = Claims(target="identity", exact=False, differentiable=True, assumes=frozenset())

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return zeros.

        Args:
            solved: the lower level at its solution.
            cotangent: v.
            state: passed through.

        Returns:
            Zeros by input name, the state, and empty stats.
        """
        return {name: _tree.zeros_like(tree) for name, tree in solved.inputs.items()}, state, Stats()


@dataclass
class Record:
    """What a watched estimator was asked, over the calls of one run.

    Attributes:
        seconds: spent inside of its products.
        solved: the lower levels that it was asked about, in order.
        drawn: how many fresh batches it asked for.
    """

    seconds: float = 0.0
    solved: list[Solved] = field(default_factory=list)
    drawn: int = 0


@dataclass(frozen=True)
class Watched(BestResponse):
    """An estimator that answers as another one does, timed, and with other draws of its own.

    The inner loop, the loss's own randomness and the last batch stay; what changes with `draw` is `Solved.seed` and the
    fresh batches that an estimator asks for.

    Args:
        estimator: the one that answers.
        record: where it is written down.
        draw: the number of the draw; 0 leaves all as it is.
        skipped: how many fresh batches earlier draws have taken.
    """

    estimator: BestResponse
    record: Record = field(compare=False)
    draw: int = 0
    skipped: int = 0

    def __post_init__(self) -> None:
        """Take over what the estimator says of itself."""
        for name in ("requires", "claims", "sees_step", "total", "steps_again", "uses_optimizer"):
            object.__setattr__(self, name, getattr(self.estimator, name))

    @property
    def follows_start(self) -> bool:
        """Whether the estimator differentiates by where the inner loop begins."""
        return self.estimator.follows_start

    @property
    def in_the_open(self) -> bool:
        """Whether the inner steps are differentiated where they are made."""
        return self.estimator.in_the_open

    def init(self, params: Tree) -> Any:
        """Return the estimator's initial state.

        Args:
            params: the level's parameters.

        Returns:
            Its state.
        """
        return self.estimator.init(params)

    def keep(self, steps: int) -> Keep:
        """Say which standings the estimator wants kept.

        Args:
            steps: the number of inner steps.

        Returns:
            Them.
        """
        return self.estimator.keep(steps)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Any]:
        """Return what the estimator answers.

        Args:
            solved: the lower level at its solution.
            cotangent: v.
            state: the estimator's.

        Returns:
            Its answer.
        """
        self.record.solved.append(solved)
        at = self._redrawn(solved)
        begin = now()
        answer = self.estimator.vjp(at, cotangent, state)
        self.record.seconds += now() - begin
        return answer

    def _redrawn(self, solved: Solved) -> Solved:
        evaluate = solved.evaluate

        def shifted(draw: int | None) -> int | None:
            if draw is None:
                return None
            self.record.drawn = max(self.record.drawn, draw + 1)
            return draw + self.skipped

        def loss(y: Tree, x: dict[str, Tree], draw: int | None = None) -> Tensor:
            return solved.loss(y, x) if draw is None else solved.loss(y, x, draw=shifted(draw))

        def evaluated(call: Any, first: Tree, x: dict[str, Tree], draw: int | None = None, **how: bool) -> Any:
            assert evaluate is not None
            return evaluate(call, first, x, shifted(draw), **how)

        if not self.estimator.claims.stochastic:
            return solved
        seed = _random.step_seed(solved.seed, "compare", self.draw) if self.draw else solved.seed
        return replace(solved, seed=seed, loss=loss, evaluate=evaluate and evaluated)


def now() -> float:
    """Return the time in seconds, once a GPU that is in use has done what it was told."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()
