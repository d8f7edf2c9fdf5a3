"""`argmin`: a solution map inside ordinary torch code, differentiable by a best response."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _tracing, _tree, operands, precision
from funcmlo._random import checked_seed
from funcmlo._tree import Tree
from funcmlo.batches import feeds
from funcmlo.doubts import blind
from funcmlo.errors import BatchError, DefinitionError, EstimatorError, FuncmloWarning, listing
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.solved import Closed, Solved
from funcmlo.level import Level
from funcmlo.operands import START, begun
from funcmlo.problem import Problem
from funcmlo.solution import SolutionMap
from funcmlo.solver import Solver
from funcmlo.unroll import Passage, hand_over, run


def argmin(
    loss: Callable[..., Any],
    optimizer: GradientTransformation | Callable[..., GradientTransformation] | Solver,
    *,
    steps: int,
    response: BestResponse,
    project: Callable[..., Tree] | None = None,
    maximize: bool = False,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    seed: int = 0,
) -> Argmin:
    """Return `solve(init, *inputs, batch=None)`, the minimizer of a loss as a differentiable function of the inputs.

    It works under `torch.func.grad`, `vjp`, `jacrev` and `vmap`, under `torch.autograd.grad` and `backward`, and inside
    itself: a loss may call another `argmin`. Everything that is differentiated must come in as an input; a loss that
    closes over a traced tensor is refused.

    Args:
        loss: `loss(params, …)`, read as a `Level`'s: the first argument is what is minimized over, one called `batch`
            takes the batch, the others are the inputs, in their order.
        optimizer: a torchopt transformation, a function of inputs that returns one (inputs that only it names come
            last), or an outside `Solver`.
        steps: the number of updates; with 0, `init` itself is taken as the solution.
        response: how the solution is differentiated; `ITD()` through the steps (and by `init`), others at the solution.
        project: keeps the parameters in a set after each update; where it holds a solution back, `ITD()`, `Penalty` and
            `AID(…, curvature="fixed_point")` know.
        maximize: whether the loss is maximized.
        autocast: the dtype in which the loss is evaluated, as a `Level`'s.
        loss_scale: under which derivatives too small for float16 are taken, as a `Level`'s.
        seed: where a loss's random draws come from: the same in every call.

    Returns:
        The solution map.

    Raises:
        DefinitionError: the declaration has no meaning; the message says what is expected.
        EstimatorError: the response needs inner steps, and there are none.

    Example:
        y* = x, so d(Σ y*²)/dx = 2x:

        >>> import torch, torchopt, funcmlo as fm
        >>> solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=fm.AID(fm.CG(5)))
        >>> torch.func.grad(lambda x: (solve(torch.zeros(2), x) ** 2).sum())(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])

    References:
        Grazzi et al. 2020, arXiv 2006.16218; Blondel et al. 2022, arXiv 2105.15183.
    """
    level = Level(
        "argmin",
        loss,
        optimizer,
        steps=steps,
        response=response,
        project=project,
        maximize=maximize,
        autocast=autocast,
        loss_scale=loss_scale,
    )
    if level.cost_buffers:
        raise DefinitionError(
            f"argmin: its loss reads {listing(map(repr, level.cost_buffers))}, but a function keeps no buffers; name the "
            "argument otherwise and hand them in as an input, or leave them out: net(params, x) takes the module's own."
        )
    if not isinstance(response, BestResponse):
        raise DefinitionError("argmin takes one response; a dict by level name is for the levels of a program.")
    if not steps and response.requires != "solution":
        raise EstimatorError(
            f"argmin: {type(response).__name__} follows inner steps, but steps=0 makes none; use AID(…), which takes init "
            "as the solution."
        )
    settings = (*(() if level.has_solver else level.optimizer_levels), *level.project_levels)
    unseen = [name for name in settings if name not in level.cost_levels]
    if unseen and response.requires == "solution" and not response.sees_step:
        warnings.warn(
            f"argmin: {type(response).__name__} looks at the solution alone, so the derivative by what only the optimizer "
            f"or the projection reads ({listing(unseen)}) is zero; use ITD(), which follows the inner steps.",
            FuncmloWarning,
            stacklevel=2,
        )
    else:
        for doubt in blind(level):
            warnings.warn(doubt.replace("level 'argmin'", "argmin", 1), FuncmloWarning, stacklevel=2)
    return Argmin(level, checked_seed("argmin", seed))


@dataclass(frozen=True)
class Argmin:
    """A differentiable solution map, made by `argmin`."""

    level: Level
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs, in the order in which they are handed in."""
        return self.level.reads_levels

    def __call__(self, init: Tree, /, *inputs: Tree, batch: Any = None, **named: Tree) -> Tree:
        """Return the solution.

        Args:
            init: where the solver starts, a tree of floating-point tensors.
            *inputs: the inputs, in the loss's order: tensors, trees of them, or anything that is not differentiated by.
            batch: what the loss's argument `batch` receives; a function from the step's number to a batch, where each
                step has its own.
            **named: inputs by name.

        Returns:
            A tree like init.

        Raises:
            BatchError: a batch came that the loss does not take, or none where it takes one.
            FuncmloError: inputs are missing or too many, or something else is not as expected.
        """
        level = self.level
        if not level.has_solver:
            operands.check_mode("argmin")
        x = operands.named("argmin", self.inputs, inputs, named)
        operands.check_init("argmin", init)
        if batch is not None and not (level.takes_batch or level.has_constant_batch):
            raise BatchError(
                "argmin: the loss has no argument batch, but one came; leave it out, or name the argument batch."
            )
        feeds([level], [level.name], {} if batch is None else {level.name: batch}, {level.name: 0}, pure=True)
        init, x, batch = operands.ordinary((init, x, batch))
        inside = replace(self, level=precision.inherited(level, init))
        with precision.apart(), operands.reading("argmin", init, x, batch):
            return inside._solve(init, x, batch)

    def _solve(self, init: Tree, x: dict[str, Tree], batch: Any) -> Tree:
        level, response = self.level, self.level.responses[0]
        differentiable, fixed = operands.split("argmin", x)
        constants, whole = _tree.partition((fixed, None if callable(batch) else batch))

        def bind(constants: list[Tensor]) -> Problem:
            """The problem with its constants, which are operands of whatever is differentiated."""
            fixed, data = whole(constants)

            def feed(t: int) -> Any:
                return operands.constant_batch("argmin", batch(t) if callable(batch) else data)

            return Problem(level, feed, self.seed, 0, fixed)

        operands.constant_batch("argmin", None if callable(batch) else batch)
        functions = [level.loss, level.optimizer, getattr(level.optimizer, "function", None), level.project]
        operands.check_closures("argmin", functions, lambda y, x: _dependent(bind(constants), y, x), init, differentiable)
        if response.in_the_open:
            return _unrolled(bind(constants), init, differentiable)

        def find(kept: tuple[list[Tensor], Tree], init: Tree, x: dict[str, Tree]) -> Tree:
            problem, begin = bind(kept[0]), begun(x, kept[1], init)
            return run(problem, (begin, problem.optimizer(x).init(begin)), x, level.steps).solved.params

        start, inputs, begin = operands.beginning(response, init, differentiable)
        if not _tracing.recording(inputs):
            return find((constants, begin), start, inputs)
        solution = SolutionMap("argmin", response, find, lambda *given: _solved(bind, response, *given))
        return solution((constants, begin), start, inputs)


def _dependent(problem: Problem, y: Tree, x: dict[str, Tree]) -> Tree:
    """Values that are traced if the loss, the projection or the optimizer depends on something traced."""
    values = [problem.cost(y, x, 0)[0]]
    level = problem.level
    if level.project is not None:
        values.append(level.projected(y, {**problem.fixed, **x}))
    if level.optimizer_is_made:
        optimizer = problem.optimizer(x)
        values.append(optimizer.update(_tree.zeros_like(y), optimizer.init(y), params=y, inplace=False)[0])
    return values


def _unrolled(problem: Problem, init: Tree, x: dict[str, Tree]) -> Tree:
    """The inner steps in the open: who differentiates the caller differentiates them."""
    with torch.set_grad_enabled(_tracing.recording(init, x)):
        y, state = init, problem.optimizer(x).init(init)
        for t in range(problem.level.steps):
            y, state, _, _ = problem.update(y, state, x, t)
    return y


def _solved(
    bind: Callable[[list[Tensor]], Problem],
    response: BestResponse,
    kept: tuple[list[Tensor], Tree],
    x: dict[str, Tree],
    y: Tree,
) -> Solved:
    """The problem at its solution, everything that may be traced laid open."""
    constants, init = kept[0], begun(x, kept[1], y)
    problem = bind(constants)
    steps = problem.level.steps
    standing = init, problem.optimizer(x).init(init)

    def loss(constants: list[Tensor], at: Tree, x: dict[str, Tree], draw: int | None = None) -> Tensor:
        return bind(constants).cost(at, x, max(steps - 1, 0) + (0 if draw is None else 1 + draw))[0]

    if response.requires == "solution" and not response.uses_optimizer:
        solved = hand_over(problem, standing, standing, (y, standing[1]), [Passage(x)] * steps, x)
    else:  # nothing of the steps left the forward pass, so they are made again
        solved = run(problem, standing, x, steps, response.requires, response.keep(steps)).solved
        if START in x:
            solved = replace(solved, start=lambda x: (x[START], problem.optimizer(x).init(x[START])))
    if response.claims.stochastic:
        solved = replace(solved, seed=operands.drawn_seed(problem.seed, "argmin", x, y))
    return replace(solved, loss=Closed(loss, constants))
