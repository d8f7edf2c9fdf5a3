"""A level with its batches and its randomness bound: its cost, and what else is evaluated for one of its steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from funcmlo import _mapped, _random, _tracing, kernels, precision
from funcmlo._tree import Tree
from funcmlo.batches import Feed, Microbatches, examples
from funcmlo.compiler import Compiler
from funcmlo.describe import compact
from funcmlo.errors import BatchError, DefinitionError, listing
from funcmlo.level import Level
from funcmlo.returned import checked_cost, new_buffers
from funcmlo.sharing import Sharing
from funcmlo.signature import BATCH, BUFFERS, Call
from funcmlo.tasks import Slice, Tasks

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Evaluation:
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
        sharing: what the processes share of the level, so that the cost is that of all of them together; None for nothing.
        part: which of a batch's microbatches alone is evaluated; None for all.
        compiler: what compiles the level's steps and products; None for nothing.
    """

    level: Level
    feed: Feed
    seed: int
    first: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    tasks: Tasks | None = None
    lane: int = 0
    sharing: Sharing | None = None
    part: int | None = None
    compiler: Compiler | None = None

    @property
    def has_tasks(self) -> bool:
        """Whether the level has tasks of its own."""
        return self.tasks is not None and self.tasks.own

    def one(self, part: Slice) -> Self:
        """Return the problem of one task, which has none itself."""
        tasks = self.tasks
        assert tasks is not None
        return replace(
            self,
            feed=lambda t: tasks.batch(self.level.name, self.feed(t), part),
            lane=tasks.lane(part),
            fixed=tasks.inputs(dict(self.fixed), part),
            tasks=None,
            sharing=None,
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
        sharing = self.sharing
        if sharing is None or not sharing.parts:
            return self._part(params, inputs, t)
        own, read = sharing.spread(params), sharing.spread_inputs(inputs)
        value, aux = self._part(own, read, t)
        return sharing.mean(sharing.tied(value, (own, read)), self.extent(t)), aux

    def _part(self, params: Tree, inputs: Mapping[str, Tree], t: int) -> tuple[Tensor, dict[str, Any]]:
        """The cost of what this process has."""
        batch = self.feed(self.first + t)
        if isinstance(batch, Microbatches):
            return self._of_parts(batch, params, inputs, t)
        if self.tasks is not None:
            stacked = [params] if self.has_tasks else []
            costs, aux = self.each(lambda one, x, own=params: one.cost(own, x, t), inputs, *stacked)
            return checked_cost(self.level.name, (self.tasks.reduced(costs, -1 if self.level.maximize else 1), aux))
        with self._evaluating(params, t):
            returned = self.level.cost(params, {**self.fixed, **inputs}, batch)
        value, aux = checked_cost(self.level.name, returned)
        if self.level.autocast or self.level.loss_scale:
            value = precision.raised(value, params)
        return (-value if self.level.maximize else value), aux

    def _of_parts(
        self, batch: Microbatches, params: Tree, inputs: Mapping[str, Tree], t: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """The cost of a batch in parts, or what one of them adds to it."""
        if self.tasks is not None:
            raise BatchError(
                f"level '{self.level.name}' has to do with tasks, and Microbatches came; pass whole batches, and "
                "chunk= says how many tasks are evaluated at once."
            )
        chosen = range(len(batch)) if self.part is None else (self.part,)
        now, costs, metrics = self, list[Tensor](), list[dict[str, Any]]()
        for i in chosen:
            value, aux = replace(now, feed=lambda t, i=i: batch[i], part=i)._part(params, inputs, t)
            costs.append(value * (batch.sizes[i] / sum(batch.sizes)))
            metrics.append(aux)
            now = now.carried(aux)
        return torch.stack(costs).sum(), mean_of(metrics, [batch.sizes[i] for i in chosen])

    def carried(self, aux: dict[str, Any]) -> Self:
        """Return the problem with the level's buffers as one evaluation left them."""
        if not self.level.carries_buffers:
            return self
        new, _ = new_buffers(self.level.name, self.fixed[BUFFERS], aux)
        return replace(self, fixed={**self.fixed, BUFFERS: new})

    def extent(self, t: int) -> int:
        """Return how many examples, or tasks, this process's cost is the mean over."""
        return examples(self.feed(self.first + t)) if self.tasks is None else self.tasks.n

    def after(self, aux: dict[str, Any], t: int) -> tuple[Self, dict[str, Any]]:
        """Return the problem with the level's buffers as an update left them; of several processes, their mean.

        Args:
            aux: what the loss returned beside the cost.
            t: the update's number within this call.

        Returns:
            The problem, and the metrics alone.

        Raises:
            LossError: the loss reads buffers and did not return new ones, or other ones.
        """
        if not self.level.carries_buffers:
            return self, aux
        new, metrics = new_buffers(self.level.name, self.fixed[BUFFERS], aux)
        if self.sharing is not None and self.sharing.parts:
            new = self.sharing.averaged(new, self.extent(t))
        return replace(self, fixed={**self.fixed, BUFFERS: new}), metrics

    def evaluate(self, call: Call, first: Tree, inputs: Mapping[str, Tree], t: int, *, is_cost: bool = False) -> Any:
        """Evaluate another function of the level's arguments, under the batch and the randomness of step first + t.

        Args:
            call: the function with what it reads.
            first: its first argument.
            inputs: the parameters of the levels that the level reads.
            t: the step's number within this call.
            is_cost: whether it is a mean over examples of what another such function returned, its first argument.

        Returns:
            What it returns.

        Raises:
            DefinitionError: it reads what the level does not.
            BatchError: the batch comes in parts.
        """
        if self.tasks is not None:
            stacked = [first] if self.has_tasks else []
            return self.each(lambda one, x, own=first: one.evaluate(call, own, x, t, is_cost=is_cost), inputs, *stacked)
        shared = self.sharing if self.sharing is not None and self.sharing.parts else None
        if shared is not None:
            inputs = shared.spread_inputs(inputs)
        if shared is not None and not is_cost:
            first = shared.spread(first)
        batch = {BATCH: self.feed(self.first + t)} if self.level.takes_batch else {}
        if isinstance(batch.get(BATCH), Microbatches):
            raise BatchError(
                f"level '{self.level.name}': {compact(call.function)} is evaluated on whole batches, and Microbatches came; "
                "use curvature='hessian', or pass the level whole batches."
            )
        values = {**self.fixed, **inputs, **batch}
        if unknown := [source for source in call.sources if source not in values]:
            raise DefinitionError(
                f"level '{self.level.name}': {compact(call.function)} reads {listing(map(repr, unknown))}, which the "
                f"level's loss does not; it can read {listing(values)}."
            )
        with self._evaluating(first, t):
            returned = call(first, values=values)
        if self.level.autocast:
            returned = precision.raised(returned, first)
        return shared.mean(returned, self.extent(t)) if shared is not None and is_cost else returned

    def _evaluating(self, params: Tree, t: int) -> AbstractContextManager[None]:
        """The state of torch in which everything of a step's cost is evaluated: its precision, kernels and seed."""
        mapped = _tracing.mapping()
        formula = self.level.second_order or mapped  # no map knows the fused kernels of attention
        if self.level.autocast is None and not formula:
            return _random.seeded(self.seed_of("", t))
        return self._carefully(params, t, formula, mapped)

    @contextmanager
    def _carefully(self, params: Tree, t: int, formula: bool, mapped: bool) -> Generator[None]:
        with (
            _mapped.Rewritten() if mapped else nullcontext(),
            precision.evaluating(self.level.autocast, params),
            kernels.attention(formula=formula),
            _random.seeded(self.seed_of("", t)),
        ):
            yield

    def seed_of(self, what: str, t: int) -> int:
        """Return the seed of what a step's cost draws, or of what else the step does."""
        task = f"[{self.lane}]" if self.lane else ""
        if not what and self.sharing is not None and self.sharing.parts:
            task += f"@{self.sharing.rank}"  # what is drawn for examples differs as they do
        if not what and self.part:
            task += f"/{self.part}"
        return _random.step_seed(self.seed, f"{self.level.name}{what}{task}", self.first + t)


def mean_of(metrics: Sequence[dict[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the metrics of a batch's parts as those of the whole.

    Args:
        metrics: the parts', alike.
        sizes: how many examples each has.

    Returns:
        Means of what is a floating-point number or tensor, weighted by examples; of other things, buffers among them, the
        last part's.
    """
    last = metrics[-1]
    mean = dict(last)
    for name in last if len(metrics) > 1 else ():
        values: list[Any] = [one.get(name) for one in metrics]
        if name != BUFFERS and all(_averages(x) for x in values):
            weighted = [n / sum(sizes) * x for n, x in zip(sizes, values, strict=True)]
            mean[name] = sum(weighted[1:], start=weighted[0])
    return mean


def _averages(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())
