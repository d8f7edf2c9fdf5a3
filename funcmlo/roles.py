"""What the levels of a program have to do with tasks and with other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from funcmlo import _collectives
from funcmlo._tree import Tree
from funcmlo.compiler import Compiler
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, listing
from funcmlo.level import Level
from funcmlo.sharing import Parallel, Sharing, part, who
from funcmlo.state import State
from funcmlo.tasks import Tasks


@dataclass(frozen=True)
class Roles:
    """What each level has to do with tasks and with other processes; levels that have nothing to do with them are left out.

    Attributes:
        tasks: the levels that have tasks or are evaluated for each task of another.
        sharing: what the processes share of each level.
        compiler: what compiles their steps and products; None for nothing.
    """

    tasks: Mapping[str, Tasks]
    sharing: Mapping[str, Sharing] = field(default_factory=dict)
    compiler: Compiler | None = None

    def who(self) -> tuple[int, int]:
        """Return this process's number and how many work together on the program: (0, 1) for one that shares nothing."""
        return who() if self.sharing else (0, 1)

    @property
    def apart(self) -> bool:
        """Whether processes hold numbers that the others do not see."""
        return any(sharing.kind == "tasks" for sharing in self.sharing.values())

    def replicated(self, name: str, state: State) -> Tree:
        """Return what all processes hold alike of a level: its parameters, its optimizer's state and its buffers."""
        if name in self._stacked:
            return ()
        return state.params[name], state.optimizer[name], state.buffers[name]

    def gathered(self, state: State) -> State:
        """Return a state with the tasks of all processes, from those that each has.

        Args:
            state: this process's.

        Returns:
            The state as one process would hold it.
        """
        return self._changed(state, lambda name, tree: _collectives.gathered(tree))

    def mine(self, state: State) -> State:
        """Return this process's part of a state with the tasks of all.

        Args:
            state: the state as one process would hold it.

        Returns:
            The state as this process holds it.
        """
        tasks = self.tasks
        return self._changed(state, lambda name, tree: tasks[name].mine(tree, tasks[name].everywhere or tasks[name].n))

    @property
    def _stacked(self) -> list[str]:
        """The levels of which each process has its own tasks."""
        return [name for name, tasks in self.tasks.items() if tasks.own and tasks.everywhere is not None]

    def _changed(self, state: State, change: Callable[[str, Tree], Tree]) -> State:
        def changed(trees: Mapping[str, Tree]) -> dict[str, Tree]:
            return {name: change(name, tree) if name in self._stacked else tree for name, tree in trees.items()}

        return replace(
            state,
            params=changed(state.params),
            optimizer=changed(state.optimizer),
            response=changed(state.response),
            buffers=changed(state.buffers),
        )


def roles(
    levels: Sequence[Level],
    users: Mapping[str, Sequence[str]],
    tasks: Mapping[str, Tasks],
    parallel: Parallel | None,
) -> Roles:
    """Work out what the processes share of each level.

    Args:
        levels: the levels, lowest first.
        users: for each level, the levels that differentiate through it.
        tasks: what they have to do with tasks.
        parallel: what the processes share; None for nothing.

    Returns:
        The roles, the tasks of this process alone in them.

    Raises:
        DefinitionError: a level or an estimator cannot be shared; the message says why and what to do.
    """
    if parallel is None:
        return Roles(tasks)
    if parallel == "data":
        return Roles(tasks, _of_data(levels, users, tasks))
    if parallel == "tasks":
        return _of_tasks(levels, tasks)
    if not any(level.response_for(user).shares_samples for level in levels for user in users[level.name]):
        raise DefinitionError(
            "parallel='samples' shares the samples of an estimator, but no level's response= draws any; expected "
            "ForwardGradient(samples) or PerturbedSolve(samples), or parallel='data'."
        )
    rank, size = who()
    return Roles(tasks, {level.name: Sharing("samples", rank, size, parts=False) for level in levels})


def _of_data(levels: Sequence[Level], users: Mapping[str, Sequence[str]], tasks: Mapping[str, Tasks]) -> dict[str, Sharing]:
    rank, size = who()
    if tasks:
        raise DefinitionError(
            f"parallel='data' shares the examples of batches, but {listing(map(repr, tasks))} have to do with tasks, whose "
            "batches lead with tasks; expected parallel='tasks'."
        )
    shared = {level.name: level for level in levels if level.takes_batch and not level.has_constant_batch}
    if not shared:
        raise DefinitionError("parallel='data' shares the examples of batches, but no level's loss takes a batch.")
    for level in shared.values():
        if level.has_solver:
            raise DefinitionError(
                f"level '{level.name}': parallel='data' shares its batch, but its outside solver would see one process's "
                "part alone; give it an optimizer, or bind its data to the loss, which takes no batch then."
            )
        for user in users[level.name]:
            response = level.response_for(user)
            if not (response.claims.data_parallel or response.synchronizes_once):
                raise DefinitionError(
                    f"level '{level.name}': {compact(response)} does not work with parallel='data' (its claims say so): it "
                    "looks at one process's examples by other ways than the level's cost; use AID(CG(…)) or ITD()."
                )
    return dict.fromkeys(shared, Sharing("data", rank, size))


def _of_tasks(levels: Sequence[Level], tasks: Mapping[str, Tasks]) -> Roles:
    rank, size = who()
    if not tasks:
        raise DefinitionError("parallel='tasks' shares the tasks of levels, but none has tasks=; expected parallel='data'.")
    sharing, own = {}, {}
    for level in levels:
        role = tasks.get(level.name)
        if role is None:
            continue
        if role.n < size:
            raise DefinitionError(
                f"level '{level.name}' meets {role.n} tasks, but {size} processes share them; start at most {role.n}, "
                "or give more tasks."
            )
        if not role.own and not isinstance(role.reduce, str):
            raise DefinitionError(
                f"level '{level.name}': reduce={role.reduce!r} looks at the costs of all tasks, which parallel='tasks' "
                "keeps in several processes; expected reduce='mean' or 'sum'."
            )
        mine = part(role.n, rank, size)
        own[level.name] = replace(role, n=mine.stop - mine.start, first=mine.start, everywhere=role.n)
        sharing[level.name] = Sharing(
            "tasks", rank, size, local=role.sources, sums=role.reduce == "sum" and not role.own, parts=not role.own
        )
    for level in levels:
        stacked = [name for name in level.reads_levels if name in tasks and tasks[name].own]
        if level.name not in tasks and stacked:
            raise DefinitionError(
                f"level '{level.name}' sees all tasks of {listing(map(repr, stacked))} at once (reduce=None), which "
                "parallel='tasks' keeps in several processes; expected reduce='mean' or 'sum'."
            )
    return Roles(own, sharing)
