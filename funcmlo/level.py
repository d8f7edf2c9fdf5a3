"""`Level`: one optimization problem of a program, as frozen configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch
from torchopt.base import GradientTransformation

from funcmlo import optim
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.fields import check_fields, check_sources, is_transformation
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.signature import BATCH, BUFFERS, Call, declared_in, read_call, reads_nothing
from funcmlo.solver import STATELESS, Solver
from funcmlo.tasks import Randomness, Reduce


@dataclass(frozen=True, eq=False)
class Level:
    """One problem: min over its own parameters of a cost that may read other levels' parameters and a batch.

    The loss's first argument is the level's own parameters; the others are level names, `batch` or buffers, by position,
    or by keyword where they are keyword-only. Arguments with a default or bound by `functools.partial` are constants.

    A loss that names `buffers` receives the level's own and returns (cost, {"buffers": new}): they move on once for each
    update, and every evaluation that belongs to the update sees them as they were before it. `<level>_buffers` are another
    level's. Nothing is differentiated by buffers, as everywhere in torch.

    Args:
        name: the level's name, which other levels' losses use as an argument name.
        loss: `loss(params, …)` → a 0-d tensor, or (0-d tensor, dict of metrics and new buffers).
        optimizer: a torchopt transformation such as `torchopt.sgd(0.1)`; or a function of level names that returns
            one, `lambda rates: torchopt.sgd(rates["lr"])`, so that its hyperparameters are a level's parameters; or an
            outside `Solver`.
        steps: updates for each update of the levels above (of a top level: for each call of `step`); with 0 the level is
            taken to be solved where it stands.
        response: how the levels above differentiate through this one's solution; a dict by level name where they
            do it differently, `{"weights": AID(CG(20)), "augmentation": FiniteDifference()}`. Where it takes second
            derivatives, `scaled_dot_product_attention` is evaluated by its formula, since the fused kernels have none.
        reads: level names (or `"batch"`) by argument name, where the loss's arguments are not named after levels.
        init: where each inner loop starts, a function of level names (`lambda meta: meta`); the optimizer starts
            afresh there too. Without it the level goes on from where it stopped.
        tasks: the number n of independent copies of the problem, one for each task, that are solved together, each with its
            own step sizes. The costs are written for one task; batches lead with the task axis, or are wrapped in
            `fm.Shared`; `fm.per_task` makes parameters and buffers of that kind. What a task's cost reads of a level with
            tasks is that task's.
        reduce: of a level without tasks whose cost reads one with tasks: what becomes of the tasks' costs, `"mean"`, `"sum"`
            or a function of the tensor of them; None for a loss that sees the stacked parameters itself.
        chunk: how many tasks are evaluated at once, by `torch.func.vmap`; None for all, 1 for one after the other, without
            a map; `"measure"` for the fastest, timed before the level's first loop (numbers then follow from the choice to
            rounding). A level that is evaluated for each task of another takes that one's, if it says nothing.
        randomness: whether tasks that are mapped together draw `"different"` numbers (others for each chunk size) or the
            `"same"`.
        project: keeps the parameters in a set after each update, or makes it a proximal step: params → params. Its further
            arguments are level names, `lambda w, log_l1: soft_threshold(w, 0.1 * log_l1.exp())`.
        warmup: updates that the level makes before the levels above it make their first one; its own step counter
            tells, so a level that has made them goes on without.
        roll_back: whether, when the levels above have made their update, the level returns to where its inner loop began
            and makes one update with their new parameters (a look-ahead, as in DARTS); its step counter returns too.
        maximize: whether the cost is maximized; gradients and responses are those of its negative.
        autocast: torch.bfloat16 or torch.float16, in which the cost is then evaluated under `torch.autocast`; solvers and
            optimizers stay in the parameters' dtypes. None takes over an autocast that surrounds the call.
        loss_scale: S, under which derivatives too small for float16 are taken: ∇(S · cost) / S, and products of every order
            likewise. With a power of two nothing else changes.
        replay: whether small inner steps may be recorded and replayed by their operations alone, in place of being written
            out by Python each time: parameters to the same bits, `ITD`'s derivative to rounding. A loss that does anything
            besides computing with tensors is never replayed; `program.replayed()` tells.

    Raises:
        DefinitionError: a field has no meaning; the message says which and what is expected.

    Example:
        >>> import torchopt
        >>> level = Level("ridge", lambda ridge, decay, batch: ..., torchopt.sgd(0.1), steps=10)
        >>> level.reads_levels, level.takes_batch
        (('decay',), True)
    """

    name: str
    loss: Callable[..., Any]
    optimizer: GradientTransformation | Callable[..., GradientTransformation] | Solver
    _: KW_ONLY
    steps: int = 1
    response: BestResponse | Mapping[str, BestResponse] = FiniteDifference()
    reads: Mapping[str, str] | None = None
    init: Callable[..., Tree] | None = None
    tasks: int | None = None
    reduce: Reduce = "mean"
    chunk: int | Literal["measure"] | None = None
    randomness: Randomness = "different"
    project: Callable[..., Tree] | None = None
    warmup: int = 0
    roll_back: bool = False
    maximize: bool = False
    autocast: torch.dtype | None = None
    loss_scale: float | None = None
    replay: bool = True

    own_argument: str | None = field(init=False, repr=False)
    """The name of the loss's first argument; None where it only takes `*args`."""
    carries_buffers: bool = field(init=False, repr=False)
    """Whether the level has buffers of its own, which its loss moves on."""
    second_order: bool = field(init=False, repr=False)
    """Whether an estimator through which the levels above differentiate takes more than gradients of the cost."""
    _cost: Call = field(init=False, repr=False)
    _start: Call | None = field(init=False, repr=False)
    _factory: Call | None = field(init=False, repr=False)
    _solver: Call | None = field(init=False, repr=False)
    _project: Call | None = field(init=False, repr=False)
    _mended: GradientTransformation | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the fields and read the signatures."""
        check_fields(self)
        owner = f"level '{self.name}': its"
        cost, own = read_call(self.loss, self.reads, owner=f"{owner} loss", own=True)
        object.__setattr__(self, "_cost", cost)
        object.__setattr__(self, "own_argument", own)
        object.__setattr__(self, "carries_buffers", BUFFERS in cost.buffers)
        object.__setattr__(self, "second_order", any(response.second_order for response in self.responses))
        start = None if self.init is None else read_call(self.init, None, owner=f"{owner} init", own=False)[0]
        object.__setattr__(self, "_start", start)
        project = self.project
        if project is not None and not reads_nothing(project):
            project = read_call(project, None, owner=f"{owner} project", own=True)[0]
        elif project is not None:
            project = Call(project)
        object.__setattr__(self, "_project", project)
        factory = solver = mended = None
        if isinstance(self.optimizer, Solver):
            function = self.optimizer.function
            solver = read_call(function, declared_in(function, self.reads), owner=f"{owner} solver", own=True)[0]
            mended = STATELESS
        elif is_transformation(self.optimizer):
            mended = optim.mend(self.optimizer)
        else:
            factory = read_call(self.optimizer, None, owner=f"{owner} optimizer", own=False)[0]
        object.__setattr__(self, "_factory", factory)
        object.__setattr__(self, "_solver", solver)
        object.__setattr__(self, "_mended", mended)
        for call, what in (
            (cost, "loss"),
            (start, "init"),
            (factory, "optimizer"),
            (solver, "solver"),
            (project, "project"),
        ):
            check_sources(self.name, call, what)

    @property
    def takes_batch(self) -> bool:
        """Whether the loss or an outside solver reads a batch."""
        return BATCH in self._cost.sources or (self._solver is not None and BATCH in self._solver.sources)

    @property
    def has_constant_batch(self) -> bool:
        """Whether the loss has an argument `batch` that is a constant, because it has a default."""
        return BATCH in self._cost.constants

    @property
    def reads_levels(self) -> tuple[str, ...]:
        """The levels that the loss, `init`, the optimizer and the projection read, each once."""
        return tuple(dict.fromkeys((*self.cost_levels, *self.loop_levels)))

    @property
    def cost_levels(self) -> tuple[str, ...]:
        """The levels that the loss itself reads."""
        return self._cost.levels

    @property
    def cost_buffers(self) -> tuple[str, ...]:
        """The buffers that the loss reads, `buffers` for its own and `<level>_buffers` for others'."""
        return self._cost.buffers

    @property
    def start_levels(self) -> tuple[str, ...]:
        """The levels that `init` reads."""
        return () if self._start is None else self._start.levels

    @property
    def optimizer_levels(self) -> tuple[str, ...]:
        """The levels that the optimizer, or an outside solver, reads."""
        call = self._factory or self._solver
        return () if call is None else call.levels

    @property
    def project_levels(self) -> tuple[str, ...]:
        """The levels that the projection reads."""
        return () if self._project is None else self._project.levels

    @property
    def loop_levels(self) -> tuple[str, ...]:
        """The levels that `init`, the optimizer and the projection read, each once."""
        return tuple(dict.fromkeys((*self.start_levels, *self.optimizer_levels, *self.project_levels)))

    @property
    def responses(self) -> tuple[BestResponse, ...]:
        """The estimators through which the levels above differentiate."""
        return (self.response,) if isinstance(self.response, BestResponse) else tuple(self.response.values())

    @property
    def optimizer_is_made(self) -> bool:
        """Whether the optimizer comes from a function, with what that function reads."""
        return self._factory is not None

    @property
    def has_solver(self) -> bool:
        """Whether an outside solver stands in the optimizer's place."""
        return self._solver is not None

    def response_for(self, upper: str) -> BestResponse:
        """Return the estimator through which a level above differentiates."""
        return self.response if isinstance(self.response, BestResponse) else self.response[upper]

    def cost(self, params: Tree, inputs: Mapping[str, Tree], batch: Any) -> Any:
        """Call the loss; what it returns is not yet checked."""
        return self._cost(params, values={**inputs, BATCH: batch})

    def starting_point(self, inputs: Mapping[str, Tree]) -> Tree:
        """Call `init`; only for a level that has one."""
        assert self._start is not None
        return self._start(values=inputs)

    def projected(self, params: Tree, inputs: Mapping[str, Tree]) -> Tree:
        """Call the projection; only for a level that has one."""
        assert self._project is not None
        return self._project(params, values=inputs)

    def solution(self, params: Tree, inputs: Mapping[str, Tree], batch: Any) -> Tree:
        """Call the outside solver; only for a level that has one."""
        assert self._solver is not None
        return self._solver(params, values={**inputs, BATCH: batch})

    def optimizer_for(self, inputs: Mapping[str, Tree]) -> GradientTransformation:
        """Return the level's optimizer, mended, at these inputs.

        Args:
            inputs: the parameters of the levels that the optimizer reads.

        Returns:
            A pure, differentiable transformation.

        Raises:
            DefinitionError: the optimizer's function returned something else.
        """
        if self._mended is not None:
            return self._mended
        assert self._factory is not None
        made = self._factory(values=inputs)
        if not is_transformation(made):
            raise DefinitionError(
                f"level '{self.name}': its optimizer function returned {type(made).__name__}; expected a functional "
                "optimizer such as torchopt.sgd(rates['lr']); wrap an outside solver in fm.Solver(…)."
            )
        return optim.mend(made)
