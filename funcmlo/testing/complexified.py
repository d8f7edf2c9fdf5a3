"""Derivatives by a complex step, exact to rounding: f'(x) v = Im f(x + ihv)/h for an analytic f, with h = 10⁻²⁰⁰.

Nothing is subtracted, so the step can be as small as numbers are. A program's inner loop runs in complex numbers too: the
gradient of an analytic cost g is the conjugate of what `torch.autograd` gives for Re g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcmlo import _random, _tree
from funcmlo._argmin import Argmin
from funcmlo._fixed_point import FixedPoint
from funcmlo._tree import Tree
from funcmlo.batches import Feed, feeds
from funcmlo.errors import EstimatorError, FuncmloError, listing
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel, unravel
from funcmlo.schedule import Loop
from funcmlo.signature import BATCH
from funcmlo.testing.differences import along
from funcmlo.testing.subjects import Subject, cotangent_like, direction_like, inputs_of, is_plain, subject, wide, wide_state


def complex_step(function: Any, /, *arguments: Any, direction: Tree = None, **keywords: Any) -> Tree:
    """Return a gradient by complex steps: exact to rounding, and independent of any differentiation rule of the function.

    It is called as `finite_difference` is: `complex_step(function, x)`, `complex_step(program, state, batches, of="x")`,
    `complex_step(solve, init, *inputs, batch=None, cotangent=None)`. The function must be analytic and made of operations
    that take complex numbers: no abs, relu, max or norm. Programs have two levels, with costs that are so, and
    optimizers that take complex numbers (`torchopt.sgd`, with momentum too, and `torchopt.adam`).

    Args:
        function: what is differentiated.
        *arguments: where.
        direction: a tree like the point; without it the whole gradient is taken, one entry at a time.
        **keywords: `of`, `batch`, `cotangent`, and inputs by name.

    Returns:
        A tree like the point, or a 0-d tensor with a direction.

    Raises:
        EstimatorError: something does not take complex numbers, or is not analytic: a central difference says otherwise.
        ParameterError: the arguments are not as expected.

    Example:
        >>> import torch, funcmlo as fm
        >>> complex_step(lambda x: torch.exp(x).sum(), torch.zeros(2))
        tensor([1., 1.], dtype=torch.float64)

    References:
        Squire and Trapp 1998, SIAM Review 40(1); Martins, Sturdza and Alonso 2003, ACM TOMS 29(3).
    """
    if len(arguments) == 2 and direction is None and is_plain(function):
        *arguments, direction = arguments  # type: ignore[assignment]
    at = subject(function, *arguments, **keywords)
    if isinstance(function, Multilevel):
        value = _of_program(function, *arguments, **keywords)
    elif isinstance(function, (Argmin, FixedPoint)):
        value = _of_solve(function, *arguments, **keywords)
    else:
        value = at.function
    x = ravel(at.point)

    suspects = _Suspects()

    def derivative(v: Tensor) -> float:
        return _part(at, value, unravel_complex(torch.complex(x, _STEP * v), at.point), suspects)

    chosen = None if direction is None else ravel(direction_like("direction", at.point, direction))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(x.shape, generator=generator, dtype=torch.float64) if chosen is None else chosen
    answer = derivative(probe)
    _check(at, answer, unravel(probe, at.point), suspects.met)
    if chosen is not None:
        return torch.tensor(answer, dtype=torch.float64)
    entries = [derivative(e) for e in torch.eye(x.numel(), dtype=torch.float64)]
    return unravel(torch.tensor(entries, dtype=torch.float64), at.point)


def unravel_complex(z: Tensor, like: Tree) -> Tree:
    """Put a complex vector's entries into a real tree's shapes."""
    return unravel(z, _tree.map(lambda x: x.to(z.dtype), like))


def _part(at: Subject, value: Callable[[Tree], Any], z: Tree, suspects: _Suspects) -> float:
    """Im f(z)/h."""
    try:
        with suspects:
            found = value(z)
    except FuncmloError:
        raise
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise EstimatorError(
            f"complex_step: {at.name} does not take complex numbers (in {suspects.last}: {str(error).splitlines()[0]}); use "
            "finite_difference."
        ) from error
    if not isinstance(found, Tensor) or found.dim():
        came = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise EstimatorError(f"complex_step: {at.name} returned {came}; expected a 0-d tensor.")
    return float(found.detach().imag) / _STEP if found.is_complex() else 0.0


def _check(at: Subject, answer: float, v: Tree, met: list[str]) -> None:
    """Hold the answer against a central difference: where they differ the function is not analytic."""
    reference, error = along(at, v)
    if abs(answer - reference) <= 2 * error + 1e-6 * abs(reference):
        return
    why = f"it calls {listing(met)}, which is not" if met else "it has a kink there, or takes real parts"
    raise EstimatorError(
        f"complex_step: {at.name} is not analytic ({why}): {answer:.6g} by a complex step, {reference:.6g} ± {error:.1g} by "
        "central differences; use finite_difference."
    )


class _Suspects(TorchFunctionMode):
    """While active, the operations that are not analytic are written down, and the last one of all."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []
        self.last = "it"

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property: real, imag
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name.strip("_") in _NOT_ANALYTIC and name not in self.met:
            self.met.append(name)
        self.last = name
        return func(*args, **(kwargs or {}))


@dataclass
class _Loop:
    """A level's inner loop in complex numbers."""

    level: Level
    feed: Feed
    seed: int
    first: int
    fixed: dict[str, Tree] = field(default_factory=dict)

    def cost(self, own: Tree, inputs: dict[str, Tree], t: int) -> Tensor:
        """The cost at step first + t, with the sign of the loss."""
        step = self.first + t
        with _random.seeded(_random.step_seed(self.seed, self.level.name, step)):
            returned = self.level.cost(own, {**self.fixed, **inputs}, self.feed(step))
        value: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return value

    def start(self, params: Tree, opt_state: Tree, inputs: dict[str, Tree]) -> tuple[Tree, Tree]:
        """Where the loop begins."""
        if self.level.init is None:
            return params, opt_state
        with _random.seeded(_random.step_seed(self.seed, f"{self.level.name}.init", self.first)):
            begin = self.level.starting_point({**self.fixed, **inputs})
        return begin, self.level.optimizer_for({**self.fixed, **inputs}).init(begin)

    def run(self, y: Tree, state: Tree, inputs: dict[str, Tree]) -> Tree:
        """Make the level's steps."""
        sign = -1 if self.level.maximize else 1
        optimizer = self.level.optimizer_for({**self.fixed, **inputs})
        inputs = _tree.detach(inputs)
        for t in range(int(self.level.steps)):
            leaves, structure = _tree.flatten(_tree.map(lambda x: x.detach().requires_grad_(), y))
            with torch.enable_grad():
                cost = sign * self.cost(_tree.unflatten(structure, leaves), inputs, t)
                real = cost.real if cost.is_complex() else cost
                grads = torch.autograd.grad(real, leaves, allow_unused=True, materialize_grads=True)
            gradient = _tree.unflatten(structure, [g.conj().resolve_conj() for g in grads])
            with torch.no_grad():
                updates, state = optimizer.update(gradient, state, params=y, inplace=False)
                y = _tree.map(lambda p, u: p + u, y, updates)
                if self.level.project is not None:
                    with _random.seeded(_random.step_seed(self.seed, f"{self.level.name}.project", self.first + t)):
                        y = self.level.projected(y, {**self.fixed, **inputs})
        return y


def _complex(tree: Tree) -> Tree:
    return wide(tree, torch.complex128)


def _followed(level: Level, step: int) -> None:
    for met, what in (
        (level.has_solver, "an outside Solver"),
        (level.roll_back, "roll_back=True"),
        (step < level.warmup, "a warm-up still due"),
    ):
        if met:
            raise EstimatorError(f"complex_step runs the inner loop in complex numbers; level '{level.name}' has {what}.")


def _of_program(program: Multilevel, state: Any, batches: Any, *, of: str) -> Callable[[Tree], Tensor]:
    state, batches = wide_state(state, batches)
    levels = {level.name: level for level in program.levels}
    before, own = program.schedule().before(of)
    if before or any(loop.first or loop.later for loop in own.first) or not own.begins_before:
        raise EstimatorError(
            f"complex_step runs levels that have no level below them; for level '{of}' of {program!r} use finite_difference."
        )
    running = [of, *(loop.level for loop in own.first if isinstance(loop, Loop))]
    for name in running[1:]:
        _followed(levels[name], state.step[name])
    feed = feeds([levels[name] for name in running], program.graph.levels, batches, state.step, pure=True)
    loops = {name: _Loop(levels[name], feed[name], state.seed, state.step[name]) for name in running}

    def inputs(name: str, values: dict[str, Tree]) -> dict[str, Tree]:
        return {source: values[source] for source in levels[name].reads_levels}

    def value(z: Tree) -> Tensor:
        values = {**state.params, of: z}
        if own.steps:
            values[of] = loops[of].start(z, (), inputs(of, values))[0]
        for inner in own.first:
            name = inner.level
            if inner.steps:
                standing = _complex(values[name]), _complex(state.optimizer[name])
                y, opt_state = loops[name].start(*standing, inputs(name, values))
                values[name] = loops[name].run(_complex(y), _complex(opt_state), inputs(name, values))
        return loops[of].cost(values[of], inputs(of, values), 0)

    return value


def _of_solve(
    solve: Argmin | FixedPoint, init: Tree, *inputs: Tree, batch: Any = None, cotangent: Tree = None, **by_name: Tree
) -> Callable[[Tree], Tensor]:
    data, v = wide(batch), ravel(cotangent_like(wide(init), cotangent))
    _, everything = inputs_of(solve, inputs, by_name)

    def solution(z: dict[str, Tree]) -> Tree:
        y = _complex(init)
        if isinstance(solve, Argmin):
            _followed(solve.level, 0)
            loop = _Loop(solve.level, data if callable(data) else lambda t: data, solve.seed, 0, everything)
            state = solve.level.optimizer_for({**everything, **z}).init(y)
            return loop.run(y, state, z)
        for _ in range(solve.steps):
            with _random.seeded(_random.step_seed(solve.seed, "fixed_point", 0)):
                y = solve.map(y, values={**everything, **z, BATCH: data})
        return y

    def value(z: dict[str, Tree]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in _tree.leaves(solution(z))]) @ v.to(torch.complex128)

    return value


_STEP = 1e-200
_NOT_ANALYTIC = {
    *("abs", "absolute", "norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", "vector_norm", "matrix_norm"),
    *("conj", "conj_physical", "real", "imag", "angle", "sgn", "view_as_real", "float", "double", "H", "mH", "adjoint"),
    *("vdot", "cdist", "dist", "svdvals", "eigh", "eigvalsh", "normalize", "round", "floor"),
}
