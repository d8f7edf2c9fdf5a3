"""Many copies of a whole program at once: seeds, starts, data, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, get_args

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.batches import Microbatches
from funcmlo.errors import BatchError, DefinitionError, ParameterError, listing
from funcmlo.hypergrad.stats import Stats
from funcmlo.multilevel import Multilevel
from funcmlo.purity import untouched
from funcmlo.state import State
from funcmlo.tasks import Randomness, Slice, Tasks


@dataclass(frozen=True)
class Replicas:
    """A program in many copies that know nothing of each other, evaluated together by `torch.func.vmap`.

    What they are made of leads with the replica axis: the states, the batches (those that all copies see are wrapped in
    `fm.Shared`), and what comes back. A small program costs its dispatch rather than its arithmetic, which is paid once.

    Args:
        program: the program.
        chunk: how many copies are evaluated at once; None for all, 1 for one after the other, without a map.
        randomness: whether copies draw `"different"` numbers (others for each chunk size) or the `"same"`.

    Raises:
        DefinitionError: the program cannot be mapped, or a setting is out of its range.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x, batch: (y - x * batch) ** 2 / 2, torchopt.sgd(1.0), response=fm.ITD()),
        ...     fm.Level("x", lambda x, y: (y - 1) ** 2 / 2, torchopt.sgd(0.5)),
        ... )
        >>> many = Replicas(program)
        >>> state = many.stack([program.init({"y": torch.zeros(()), "x": torch.zeros(())}) for _ in range(3)])
        >>> state, metrics = many.step(state, {"y": torch.tensor([1.0, 2.0, 3.0])})
        >>> state.params["x"], metrics["x"]["cost"].shape
        (tensor([0.5000, 1.0000, 1.5000]), torch.Size([3]))
    """

    program: Multilevel
    chunk: int | None = None
    randomness: Randomness = "different"

    def __post_init__(self) -> None:
        """Refuse what cannot be mapped."""
        chunk = self.chunk
        if not isinstance(self.program, Multilevel):
            raise DefinitionError(f"Replicas takes a Multilevel; {type(self.program).__name__} came.")
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, Integral) or chunk < 1):
            raise DefinitionError(f"Replicas(chunk={chunk!r}); expected an integer of at least 1, or None.")
        if self.randomness not in get_args(Randomness):
            raise DefinitionError(f"Replicas(randomness={self.randomness!r}); expected 'different' or 'same'.")
        if self.program.composition == "nested" and chunk != 1:
            raise DefinitionError(
                'Replicas: composition="nested" solves again inside its derivatives and cannot be mapped; expected '
                'composition="paths", or chunk=1, which takes one copy after the other.'
            )
        if self.program._plan.roles.sharing:
            raise DefinitionError(
                "Replicas: a program with parallel= shares its work with other processes, which a map cannot; leave "
                "parallel= out, and give each process replicas of its own."
            )

    def stack(self, states: Sequence[State]) -> State:
        """Put states of single copies together.

        Args:
            states: they stand at the same step, with the same seed: what sets copies apart is their numbers.

        Returns:
            A state whose tensors lead with the replica axis.

        Raises:
            ParameterError: the states do not go together.
        """
        if not states or not all(isinstance(state, State) for state in states):
            raise ParameterError(
                f"stack takes the states that program.init returns; {listing(type(x).__name__ for x in states)} came."
            )
        first = states[0]
        for i, state in enumerate(states):
            for what in ("seed", "step"):
                if getattr(state, what) != getattr(first, what):
                    raise ParameterError(
                        f"stack: state {i} has {what} {getattr(state, what)}, state 0 has {getattr(first, what)}; a map has "
                        "one for all copies. Give init the same seed=; copies draw different numbers by "
                        "randomness='different', and start from parameters of their own."
                    )
            if difference := _tree.mismatch(_tensors(first), _tensors(state)):
                raise ParameterError(f"stack: the tensors of state {i} and of state 0 differ: {difference}.")
        stacked = [torch.stack(parts) for parts in zip(*(_tree.partition(state)[0] for state in states), strict=True)]
        whole: State = _tree.partition(first)[1](stacked)
        return whole

    def unstack(self, state: State) -> list[State]:
        """Return the states of the single copies, with which each can go on alone.

        Args:
            state: a state whose tensors lead with the replica axis.

        Returns:
            One state for each copy.
        """
        return [_tree.map_tensors(lambda x, i=i: x[i].clone(), state) for i in range(self._tasks(state).n)]  # type: ignore[misc]

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, dict[str, dict[str, Any]]]:
        """Make one outer step of every copy.

        Args:
            state: where the copies stand; it is not changed.
            batches: by level name, as for the program, but that tensors lead with the replica axis, or are inside of
                `fm.Shared`.

        Returns:
            The new state and the program's metrics; tensors lead with the replica axis, and counts are each copy's. Copies
            whose numbers are no longer finite go on beside the others; their costs tell.
        """

        def one(own: State, batches: dict[str, Any]) -> tuple[State, Tree]:
            after, metrics = self.program.step(own, batches)
            return replace(after, seed=state.seed), {name: _opened(level) for name, level in metrics.items()}

        after, metrics = self._each(one, state, batches)
        return after, {name: _closed(level) for name, level in metrics.items()}

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True, with_stats: bool = False
    ) -> Any:
        """Return the gradients that `step` would give the copies' optimizers of level `of`; nothing is updated.

        Args:
            state: where the copies stand.
            batches: as for `step`, but for iterators.
            of: the level's name.
            solve: whether the lower levels make their inner steps first.
            with_stats: whether to return the stats too.

        Returns:
            A tree like the level's parameters in all copies, or (that tree, stats by lower level).
        """

        def one(own: State, batches: dict[str, Any]) -> tuple[Tree, Tree]:
            gradient, stats = self.program.hypergradient(own, batches, of=of, solve=solve, with_stats=True)
            return gradient, _opened({"stats": stats})

        gradient, stats = self._each(one, state, batches)
        return (gradient, _closed(stats)["stats"]) if with_stats else gradient

    def cost(self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True) -> Tensor:
        """Return the costs that level `of` would pay at its next update; nothing is updated.

        Args:
            state: where the copies stand.
            batches: as for `hypergradient`.
            of: the level's name.
            solve: whether the lower levels make their inner steps first.

        Returns:
            One cost for each copy.
        """
        costs: Tensor = self._each(lambda own, given: self.program.cost(own, given, of=of, solve=solve), state, batches)
        return costs

    def _each(self, function: Callable[[State, dict[str, Any]], Tree], state: State, batches: Mapping[str, Any]) -> Tree:
        """What a function of one copy's state and batches returns, for all of them."""
        tasks = self._tasks(state)
        if (self.chunk or tasks.n) < tasks.n and any(isinstance(batch, Iterator) for batch in batches.values()):
            raise BatchError(
                f"Replicas(chunk={self.chunk}) asks for a step's batches once for every {self.chunk} copies, and an "
                "iterator gives them once; pass a fixed batch, or a function from the level's step number to a batch."
            )

        def one(part: Slice) -> Tree:
            given = {name: _taken(tasks, name, batch, part) for name, batch in batches.items()}
            lane = tasks.lane(part)
            seed = _random.step_seed(state.seed, "replicas", lane) if lane else state.seed
            return function(replace(part(state), seed=seed), given)

        read = {f"the parameters of level '{name}' were": tree for name, tree in state.params.items()}
        fixed = {name: batch for name, batch in batches.items() if not (callable(batch) or isinstance(batch, Iterator))}
        read |= {f"the batch of level '{name}' was": batch for name, batch in fixed.items()}
        with untouched(read, "The numbers that came in are changed now."), torch.no_grad():
            return tasks.values(one)

    def _tasks(self, state: State) -> Tasks:
        """The copies, as what is evaluated for each task is."""
        if not isinstance(state, State):
            raise ParameterError(f"expected the State that stack returns; {type(state).__name__} came.")
        sizes = {x.shape[0] if x.dim() else None for x in _tree.leaves(state) if isinstance(x, Tensor)}
        if len(sizes) != 1 or None in sizes:
            raise ParameterError(
                f"the state's tensors lead with {listing(map(str, sizes))}; expected one number of copies, as stack makes "
                "them."
            )
        n = next(iter(sizes))
        assert n is not None
        chunk = None if self.chunk is None else int(self.chunk)
        return Tasks(
            n, own=True, sources=frozenset(), chunk=chunk, randomness=self.randomness, called="copies of the program"
        )


def _taken(tasks: Tasks, level: str, batch: Any, part: Slice) -> Any:
    """What of a level's batches one copy sees."""
    if isinstance(batch, Microbatches):
        raise BatchError(
            f"level '{level}': Microbatches came, and replicas take whole batches; chunk= says how many copies are "
            "evaluated at once."
        )
    if isinstance(batch, Iterator):
        return (tasks.batch(level, one, part) for one in batch)
    if callable(batch):
        return lambda t: tasks.batch(level, batch(t), part)
    return tasks.batch(level, batch, part)


def _tensors(state: State) -> list[Tensor]:
    return _tree.partition(state)[0]


def _opened(told: dict[str, Any]) -> dict[str, Any]:
    """A level's metrics as a tree: of stats, what a copy's data decide are tensors."""
    if "stats" not in told:
        return told
    opened = {}
    for name, stats in told["stats"].items():
        if isinstance(stats, Stats):
            values = {f.name: getattr(stats, f.name) for f in fields(stats)}
            stats = {n: _tensor(x) if n in _DECIDED and x is not None else x for n, x in values.items()}
        opened[name] = (isinstance(told["stats"][name], Stats), stats)
    return {**told, "stats": opened}


def _tensor(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


def _closed(told: dict[str, Any]) -> dict[str, Any]:
    """What `_opened` was given."""
    if "stats" not in told:
        return told
    return {**told, "stats": {name: Stats(**stats) if own else stats for name, (own, stats) in told["stats"].items()}}


_DECIDED = ("iterations", "residual", "converged", "negative_curvature")
