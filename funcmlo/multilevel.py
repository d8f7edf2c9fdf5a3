"""`Multilevel`: a program of levels; state in, state out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from funcmlo import calls
from funcmlo._tree import Tree
from funcmlo.compiler import Compiler
from funcmlo.compiling import compiled
from funcmlo.footprint.predict import predict
from funcmlo.initial import first_state
from funcmlo.level import Level
from funcmlo.plan import Composition, Plan
from funcmlo.replaying.recording import told as replaying
from funcmlo.schedule import Schedule
from funcmlo.sharing import Parallel
from funcmlo.state import State
from funcmlo.train.callbacks import as_callback
from funcmlo.train.loop import run
from funcmlo.train.progress import Progress
from funcmlo.train.settings import Validate, check_data, checked
from funcmlo.train.told import Told
from funcmlo.whole import Whole

if TYPE_CHECKING:
    from pandas import DataFrame


class Multilevel:
    """A program of levels, lowest first: pure functions from state to state.

    Args:
        *levels: the levels, the lowest first.
        composition: `"paths"`, the products along the graph's paths (Betty's eq. 2), which `graph.exact(k)` compares with
            the total derivative; or `"nested"`, the total derivative of any hierarchy, the Hessians through lower best
            responses included.
        parallel: what processes that torchrun started share, inside of `fm.processes()`; a script that runs alone does
            without. `"data"`: each passes its own part of every batch (`run` takes care of that), costs are means over
            examples, and everything is as with one process that has all of them. `"tasks"`: each solves some of the tasks.
            `"samples"`: each draws some of an estimator's samples. All hold the same parameters, to the bit; of levels with
            tasks each has its own.

    Raises:
        DefinitionError: the levels do not fit together.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=20, response=fm.AID(fm.CG(5))),
        ...     fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.25)),
        ... )
        >>> state = program.init({"y": torch.zeros(()), "x": torch.zeros(())})
        >>> for _ in range(20):
        ...     state, metrics = program.step(state, {})
        >>> round(float(state.params["x"]), 3)
        1.0

    References:
        Choe et al. 2023 (Betty), arXiv 2207.02849.
    """

    def __init__(self, *levels: Level, composition: Composition = "paths", parallel: Parallel | None = None) -> None:
        self._plan = Plan.of(levels, composition, parallel)
        self.levels, self.composition, self.graph = levels, self._plan.composition, self._plan.graph
        self.compiler: Compiler | None = None
        self._whole: Whole | None = None
        self._plan.warn(stacklevel=2)

    def schedule(self) -> Schedule:
        """Return the order of one outer step, which prints itself.

        Returns:
            The schedule; iterating over it gives the level of every update in order.
        """
        return self._plan.schedule

    def init(self, params: Mapping[str, Tree], *, buffers: Mapping[str, Tree] | None = None, seed: int = 0) -> State:
        """Return the program's first state.

        Args:
            params: each level's parameters, trees of floating-point tensors, which are copied. A level with `init=` may
                be left out. Those of a level with tasks lead with the task axis (`fm.per_task`), and so do its buffers.
            buffers: by level name, the buffers that losses read: trees of tensors, which are copied.
            seed: the integer from which all randomness follows.

        Returns:
            The state before the first step.

        Raises:
            ParameterError: a level's parameters are missing, unknown, or no tree of floating-point tensors; buffers that a
                loss reads are missing, or are no tensors.
        """
        given = {} if buffers is None else buffers
        return first_state(self.levels, self._plan.keepers, self._plan.roles.tasks, params, given, seed)

    def step(self, state: State, batches: Mapping[str, Any]) -> tuple[State, dict[str, dict[str, Any]]]:
        """Make one outer step, in the order that `schedule()` tells.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch, an iterator (one batch per update) or a function from the level's
                step number to a batch.

        Returns:
            The new state, and metrics by level, of its last inner loop: `cost` (at the last update, before it), `costs` (at
            all of them), `aux`, `gradient_norm` (of the last update's gradient; not of outside solvers); for a level with
            levels below it and for a top level also `stats` (by lower level) of the last update's hypergradient.

        Raises:
            FuncmloError: the state, a batch, a loss's value or a response's answer is not as expected, or something
                is no longer finite. The state that came in is still good.
        """
        return self._clocked_step(state, batches)[:2]

    def _clocked_step(
        self, state: State, batches: Mapping[str, Any]
    ) -> tuple[State, dict[str, dict[str, Any]], dict[str, float]]:
        """Make one outer step, and tell how long each level took."""
        if self._whole is not None and (stepped := self._whole.step(state, batches)) is not None:
            return *stepped, {}
        return calls.step(self._plan, state, batches)

    def hypergradient(
        self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True, with_stats: bool = False
    ) -> Any:
        """Return the (first) gradient that `step` would give level `of`'s optimizer; nothing is updated.

        Args:
            state: where the program stands; it is not changed.
            batches: by level name, a fixed batch or a function from the level's step number to a batch; levels that make no
                update before this one's first can be left out.
            of: the level's name.
            solve: whether the lower levels make their inner steps first; without, the state's parameters are taken
                as their solutions.
            with_stats: whether to return the stats of the best-response products too.

        Returns:
            A tree like the level's parameters, or (that tree, stats by lower level).

        Raises:
            FuncmloError: as for `step`; besides, an iterator is refused.
        """
        if self._whole is not None and (told := self._whole.hypergradient(state, batches, of, solve)) is not None:
            return told if with_stats else told[0]
        folded = calls.hypergradient(self._plan, state, batches, of, solve)
        return (folded.gradient, folded.plain_stats()) if with_stats else folded.gradient

    def cost(self, state: State, batches: Mapping[str, Any], *, of: str, solve: bool = True) -> Tensor:
        """Return the cost that level `of` would pay at its next update in `step`; nothing is updated.

        As a function of `state.params[of]` it is what `hypergradient` is the derivative of, where the response is exact; a
        level with `maximize=True` has its cost with the sign of its loss, and its hypergradient with the other one.

        Args:
            state: where the program stands; it is not changed.
            batches: as for `hypergradient`.
            of: the level's name.
            solve: whether the lower levels make their inner steps first.

        Returns:
            The cost, a 0-d tensor.

        Raises:
            FuncmloError: as for `hypergradient`.

        Example:
            One step of rate 1/2 from 0 takes y to 1/2, which costs (1/2 − 1)²:

            >>> import torch, torchopt, funcmlo as fm
            >>> program = Multilevel(
            ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=fm.ITD()),
            ...     fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.1)),
            ... )
            >>> program.cost(program.init({"y": torch.zeros(()), "x": torch.ones(())}), {}, of="x")
            tensor(0.2500)
        """
        return calls.cost(self._plan, state, batches, of, solve)

    def replayed(self) -> dict[str, str]:
        """Say by level whether its inner steps were replayed by their recorded operations, or why they were not.

        Returns:
            "replayed", the reason, or "not tried" where no loop was long enough.

        Example:
            >>> import torch, torchopt, funcmlo as fm
            >>> program = fm.Multilevel(
            ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=9),
            ...     fm.Level("x", lambda x, y: print("hello") or (y**2).sum(), torchopt.sgd(0.1)),
            ... )
            >>> state, _ = program.step(program.init({"y": torch.zeros(2), "x": torch.ones(2)}), {})
            hello
            >>> program.replayed()
            {'y': 'replayed', 'x': 'not tried'}
        """
        return {level.name: replaying(level) for level in self.levels}

    compile = compiled
    memory = predict

    def run(
        self,
        state: State,
        data: Mapping[str, Any],
        *,
        steps: int,
        checkpoint: str | PathLike[str] | None = None,
        every: int = 100,
        keep: int = 3,
        validate: Validate | Mapping[str, Validate] | None = None,
        validate_every: int | Mapping[str, int] = 1,
        callbacks: Sequence[Any] = (),
        on_nonfinite: Literal["raise", "skip"] = "raise",
        accumulate: int | Mapping[str, int] | None = None,
        progress: bool = True,
    ) -> tuple[State, DataFrame]:
        """Make many outer steps, drawing from loaders, and keep a history of them.

        An interrupt (Ctrl-C, the stop button of a notebook) hands back the state reached. An error carries it: its `state`
        and `history` are those of the last good step.

        Args:
            state: where the program stands; it is not changed.
            data: by level name, a `DataLoader`, which is cycled and reshuffled by the state's seed; any other iterable of
                batches, begun again when it ends; a function from the level's step number to a batch; or a fixed batch.
                Batches are moved to the parameters' devices. With `parallel="data"` (and, for levels with tasks, `"tasks"`)
                each process loads its own part of every batch of a `DataLoader`; other data are passed as they are.
            steps: outer steps in total: with a checkpoint, those made before count.
            checkpoint: a folder; from its newest checkpoint the run goes on, to the same bits as if it had not ended.
            every: outer steps between two checkpoints; there is one at the end too.
            keep: how many checkpoints stay.
            validate: a function of the state that returns a number or a dict of numbers; or several, by name.
            validate_every: outer steps between two calls; by name where they differ.
            callbacks: loggers such as `fm.CSVLogger(…)`, `fm.EarlyStopping(…)`, functions (step, row, state), or other
                objects with the methods of `fm.Callback`.
            on_nonfinite: `"raise"`; or `"skip"`, which passes over the batches of a step that comes upon an infinite or NaN
                number and leaves the state as it was, but for the levels' step counters; after 20 in a row it raises.
            accumulate: how many batches make one (`fm.Microbatches`), for all levels or by level name.
            progress: whether to show a bar.

        Returns:
            The state reached, and the history: a pandas frame with a row for each outer step, which draws itself
            (`history.figure()`); `history.attrs["stopped"]` says why the run ended.

        Raises:
            FuncmloError: as for `step`; data cannot be drawn, a checkpoint cannot be written or does not fit, or there is
                not enough memory.

        Example:
            >>> import torch, torchopt, funcmlo as fm
            >>> points = torch.utils.data.TensorDataset(torch.arange(8.0))
            >>> program = Multilevel(
            ...     fm.Level("mean", lambda mean, batch: ((mean - batch[0]) ** 2).mean() / 2, torchopt.sgd(0.1)),
            ... )
            >>> loader = torch.utils.data.DataLoader(points, batch_size=4, shuffle=True)
            >>> state = program.init({"mean": torch.zeros(())})
            >>> state, history = program.run(state, {"mean": loader}, steps=100, progress=False)
            >>> bool(abs(state.params["mean"] - 3.5) < 1), len(history)
            (True, 100)
        """
        settings = checked(
            self.graph.levels,
            steps=steps,
            checkpoint=checkpoint,
            every=every,
            keep=keep,
            validate=validate,
            validate_every=validate_every,
            on_nonfinite=on_nonfinite,
            accumulate=accumulate,
        )
        check_data(data, self.graph.levels)
        heard = [*map(as_callback, callbacks), *([Progress(self.graph.tops)] if progress else [])]
        told = Told(heard, *self._plan.roles.who())
        about = {"program": repr(self), "levels": self.graph.levels, "settings": {x.name: repr(x) for x in self.levels}}
        plan = self._plan
        return run(self._clocked_step, plan.passed_over, state, data, settings, told, plan.roles, about)

    def __repr__(self) -> str:
        """List the levels, lowest first."""
        return f"Multilevel({', '.join(self.graph.levels)})"
