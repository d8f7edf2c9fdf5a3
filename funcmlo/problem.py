"""A level with its batches and its randomness bound: its cost, its update, and where its inner loop begins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _diff, _random, _tracing, _tree, kernels, optim, precision
from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, EstimatorError, FuncmloWarning, ParameterError, listing
from funcmlo.level import Level
from funcmlo.returned import checked_cost, new_buffers
from funcmlo.signature import BATCH, BUFFERS, Call
from funcmlo.tasks import Slice, Tasks


@dataclass(frozen=True)
class Problem:
    """A level with its batches and its randomness bound, so that everything is a function of parameters.

    Attributes:
        level: the level.
        feed: its batches by step.
        seed: the program's seed.
        first: the step that the level makes next, counted from its first step ever.
        fixed: what the loss reads and nothing is ever differentiated by: buffers as they are now, constant inputs.
        tasks: what the level has to do with tasks; None for nothing. With tasks of its own, all that it takes and returns
            leads with the task axis, and its cost is the sum over tasks, whose gradient is every task's own.
        lane: sets what a task draws apart from what others do.
    """

    level: Level
    feed: Feed
    seed: int
    first: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tasks: Tasks | None = None
    lane: int = 0

    @property
    def has_tasks(self) -> bool:
        """Whether the level has tasks of its own."""
        return self.tasks is not None and self.tasks.own

    def one(self, part: Slice) -> Problem:
        """Return the problem of one task, which has none itself."""
        tasks = self.tasks
        assert tasks is not None
        # One lane draws the same as all of a map by itself; what is evaluated after it must draw other numbers.
        apart = part.first > 0 and tasks.randomness == "different"
        return replace(
            self,
            feed=lambda t: tasks.batch(self.level.name, self.feed(t), part),
            lane=part.first if apart else 0,
            fixed=tasks.inputs(dict(self.fixed), part),
            tasks=None,
        )

    def each(self, answer: Callable[..., Tree], inputs: Mapping[str, Tree], *stacked: Tree) -> Tree:
        """Return what the problems of all tasks answer, stacked.

        Args:
            answer: `answer(one, inputs, *own)` → a tree, for the problem of one task and what is that task's.
            inputs: the parameters of the levels that the level reads.
            *stacked: trees whose tensors lead with the task axis.

        Returns:
            The tree, its tensors with the task axis first.
        """
        tasks = self.tasks
        assert tasks is not None
        return tasks.values(lambda part: answer(self.one(part), tasks.inputs(dict(inputs), part), *part(stacked)))

    def cost(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> tuple[Tensor, dict[str, Any]]:
        """Evaluate the level's cost at step first + t, negated if it is maximized.

        Args:
            params: the level's own parameters.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.

        Returns:
            The cost to be minimized, a 0-d tensor, and the loss's metrics.
        """
        if self.tasks is not None:
            stacked = [params] if self.has_tasks else []
            costs, aux = self.each(lambda one, x, own=params: one.cost(own, x, t), inputs, *stacked)
            return checked_cost(self.level.name, (self.tasks.reduced(costs, -1 if self.level.maximize else 1), aux))
        step = self.first + t
        batch = self.feed(step)
        with self._evaluating(params, t):
            returned = self.level.cost(params, {**self.fixed, **inputs}, batch)
        value, aux = checked_cost(self.level.name, returned)
        if self.level.autocast or self.level.loss_scale:
            value = precision.raised(value, params)
        return (-value if self.level.maximize else value), aux

    def after(self, aux: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
        """Return the problem with the level's buffers as an update left them.

        Args:
            aux: what the loss returned beside the cost.

        Returns:
            The problem, and the metrics alone.

        Raises:
            LossError: the loss reads buffers and did not return new ones, or other ones.
        """
        if not self.level.carries_buffers:
            return self, aux
        new, metrics = new_buffers(self.level.name, self.fixed[BUFFERS], aux)
        return replace(self, fixed={**self.fixed, BUFFERS: new}), metrics

    def evaluate(self, call: Call, first: Tree, inputs: Mapping[str, Tree], t: int) -> Any:
        """Evaluate another function of the level's arguments, under the batch and the randomness of step first + t.

        Args:
            call: the function with what it reads.
            first: its first argument.
            inputs: the parameters of the levels that the level reads.
            t: the step's number within this call.

        Returns:
            What it returns.

        Raises:
            DefinitionError: it reads what the level does not.
        """
        if self.tasks is not None:
            stacked = [first] if self.has_tasks else []
            return self.each(lambda one, x, own=first: one.evaluate(call, own, x, t), inputs, *stacked)
        step = self.first + t
        values = {**self.fixed, **inputs, **({BATCH: self.feed(step)} if self.level.takes_batch else {})}
        if unknown := [source for source in call.sources if source not in values]:
            raise DefinitionError(
                f"level '{self.level.name}': {compact(call.function)} reads {listing(map(repr, unknown))}, which the "
                f"level's loss does not; it can read {listing(values)}."
            )
        with self._evaluating(first, t):
            returned = call(first, values=values)
        return precision.raised(returned, first) if self.level.autocast else returned

    def _evaluating(self, params: Tree, t: int) -> AbstractContextManager[None]:
        """The state of torch in which everything of a step's cost is evaluated: its precision, kernels and seed."""
        formula = self.level.second_order or _tracing.mapping()  # no map knows the fused kernels of attention
        if self.level.autocast is None and not formula:
            return _random.seeded(self._seed_of("", t))
        return self._carefully(params, t, formula)

    @contextmanager
    def _carefully(self, params: Tree, t: int, formula: bool) -> Generator[None]:
        with (
            precision.evaluating(self.level.autocast, params),
            kernels.attention(formula=formula),
            _random.seeded(self._seed_of("", t)),
        ):
            yield

    def update(
        self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int, correction: Tree = None
    ) -> tuple[Tree, Tree, Tensor, Any]:
        """Make the level's step first + t.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            t: the step's number within this call.
            correction: what the level's hypergradient has besides its direct gradient; None for nothing.

        Returns:
            The new parameters, the new optimizer state, the cost before the step (of an outside solver: after it), and
            the loss's metrics.
        """
        if self.level.has_solver:
            return self._solve(params, opt_state, inputs, t)
        with precision.scaled(self.level.loss_scale):
            value, aux, (gradient,), (used,) = _diff.value_and_grads(lambda at: self.cost(at, inputs, t), [params])
        if not used and _tree.leaves(params):
            warnings.warn(
                f"level '{self.level.name}': its cost does not depend on its own parameters, so they only move by what "
                "the optimizer adds; is the first argument used, and outside torch.no_grad?",
                FuncmloWarning,
                stacklevel=2,
            )
        if correction is not None:
            gradient = _tree.add(gradient, correction)
        params, opt_state = self.apply(params, opt_state, inputs, gradient, t)
        return params, opt_state, value, aux

    def _solve(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], t: int) -> tuple[Tree, Tree, Tensor, Any]:
        """Let the outside solver make the step."""
        if self.has_tasks:
            *standing, costs, aux = self.each(lambda one, x, *own: one._solve(*own, x, t), inputs, params, opt_state)
            return *standing, costs.sum(), aux
        batch = self.feed(self.first + t)
        with torch.no_grad(), _random.seeded(self._seed_of(".solver", t)):
            try:  # on copies, because what leaves torch may be written to unseen
                found = _tracing.call_outside(self.level.solution, params, {**self.fixed, **inputs}, batch)
            except RuntimeError as error:
                if not _tracing.transforming():
                    raise
                why = str(error).splitlines()[0]
                raise EstimatorError(
                    f"level '{self.level.name}': its solver failed under a torch.func transform ({why}); one that "
                    "leaves torch cannot be mapped by vmap: call it in a loop (of a level with tasks: chunk=1)."
                ) from error
            if difference := _tree.mismatch(params, found):
                raise ParameterError(
                    f"level '{self.level.name}': what its solver returned and its parameters differ: {difference}."
                )
            found = self._projected(_tree.detach(found), inputs, t)
        return found, opt_state, *self.cost(found, inputs, t)

    def apply(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], gradient: Tree, t: int = 0) -> tuple[Tree, Tree]:
        """Give a gradient to the level's optimizer and project what comes out.

        Args:
            params: the level's own parameters.
            opt_state: its optimizer's state.
            inputs: the parameters of the levels that it reads.
            gradient: a tree like params.
            t: the step's number within this call.

        Returns:
            The new parameters and optimizer state.

        Raises:
            ParameterError: the projection changed the structure, a shape or a dtype.
        """
        if self.has_tasks:
            own = (params, opt_state, gradient)
            new, opt_state = self.each(lambda one, x, y, s, g: one.apply(y, s, x, g, t), inputs, *own)
            return new, opt_state
        updates, opt_state = self.updates(params, opt_state, inputs, gradient)
        return self._projected(optim.apply(params, updates), inputs, t), opt_state

    def updates(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree], gradient: Tree) -> tuple[Tree, Tree]:
        """Return what the level's optimizer makes of a gradient: the updates, which are to be added, and its new state."""
        updates, opt_state = self.optimizer(inputs).update(gradient, opt_state, params=params, inplace=False)
        return updates, opt_state

    def excess(self, params: Tree, inputs: dict[str, Tree], t: int) -> Tree:
        """Return P(y) − y for the level's projection P at y = params; None where there is none."""
        if self.level.project is None:
            return None
        # On a copy, because a projection may write to what it is given.
        return _tree.subtract(self._projected(_tree.map(torch.clone, params), inputs, t), params)

    def _projected(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> Tree:
        """The parameters kept in the level's set."""
        if self.level.project is None:
            return params
        with _random.seeded(self._seed_of(".project", t)):
            projected = self.level.projected(params, {**self.fixed, **inputs})
        if difference := _tree.mismatch(params, projected):
            raise ParameterError(
                f"level '{self.level.name}': what project= returns and its parameters differ: {difference}."
            )
        return projected

    def start(self, inputs: dict[str, Tree], params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
        """Return where the inner loop begins, and the optimizer's state there: where the level stands, or as `init` says."""
        if self.level.init is None:
            return params, opt_state
        if self.has_tasks:
            begin, opt_state = self.each(lambda one, x, *own: one.start(x, *own), inputs, params, opt_state)
            return begin, opt_state
        with _random.seeded(self._seed_of(".init", 0)):
            begin = self.level.starting_point({**self.fixed, **inputs})
        if difference := _tree.mismatch(params, begin):
            raise ParameterError(f"level '{self.level.name}': what init= returns and its parameters differ: {difference}.")
        return begin, self.optimizer(inputs).init(begin)

    def optimizer(self, inputs: Mapping[str, Tree]) -> GradientTransformation:
        """Return the level's optimizer at these inputs."""
        return self.level.optimizer_for({**self.fixed, **inputs})

    def _seed_of(self, what: str, t: int) -> int:
        """The seed of what a step's cost draws, or of what else the step does."""
        task = f"[{self.lane}]" if self.lane else ""
        return _random.step_seed(self.seed, f"{self.level.name}{what}{task}", self.first + t)
