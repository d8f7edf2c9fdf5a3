"""`fixed_point`: y = Φ(y, inputs) inside ordinary torch code, differentiable by a best response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from funcmlo import _random, _tracing, _tree, operands, precision
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError, ParameterError
from funcmlo.hypergrad.aid import AID
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.hypergrad.solved import Closed, Solved
from funcmlo.signature import BATCH, Call, read_call
from funcmlo.solution import SolutionMap
from funcmlo.solver import STATELESS


def fixed_point(map: Callable[..., Tree], *, steps: int, response: BestResponse, seed: int = 0) -> FixedPoint:
    """Return `solve(init, *inputs, batch=None)`, the solution of y = Φ(y, *inputs) as a differentiable function.

    The map is iterated. With A = I − ∂Φ/∂y the response of an implicit estimator is (∂Φ/∂x)ᵀ A⁻ᵀ v; A is not symmetric,
    so `AID` needs a solver that takes such systems: `Neumann(K, scale=1.0)`, whose sum is Σ_{k≤K} (∂Φ/∂y)ᵀᵏ v, or
    `Direct()`. `ITD()` differentiates the iterations.

    Args:
        map: `map(y, …)` → a tree like y; its arguments are read as those of a loss of `argmin`.
        steps: the number of iterations; with 0, `init` itself is taken as the solution.
        response: how the solution is differentiated.
        seed: where the map's random draws come from: the same in every iteration.

    Returns:
        The solution map.

    Raises:
        DefinitionError: the declaration has no meaning; the message says what is expected.
        EstimatorError: the response cannot answer for a fixed point.

    Example:
        y = (y + x/y)/2 is solved by √x:

        >>> import torch, funcmlo as fm
        >>> root = fm.fixed_point(lambda y, x: (y + x / y) / 2, steps=8, response=fm.AID(fm.Neumann(2, scale=1.0)))
        >>> torch.func.grad(lambda x: root(torch.ones(()), x))(torch.tensor(4.0))
        tensor(0.2500)

    References:
        Grazzi et al. 2020, arXiv 2006.16218; Bai, Kolter and Koltun 2019, arXiv 1909.01377.
    """
    call, _ = read_call(map, None, owner="fixed_point: its map", own=True)
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 0:
        raise DefinitionError(f"fixed_point: steps={steps!r}; expected an integer of at least 0.")
    if not isinstance(response, BestResponse):
        raise DefinitionError(f"fixed_point: response={response!r} is no best response; expected ITD() or AID(…).")
    if isinstance(response, FiniteDifference):
        raise EstimatorError("fixed_point: FiniteDifference needs a loss, and a fixed point has none; use AID(…) or ITD().")
    if isinstance(response, AID) and response.solver.symmetric_only:
        raise EstimatorError(
            f"fixed_point: {type(response.solver).__name__} solves symmetric systems, and I − ∂Φ is not symmetric; use "
            "AID(Neumann(…, scale=1.0)), which sums the map's own powers, or AID(Direct())."
        )
    if not steps and response.requires != "solution":
        raise EstimatorError(
            f"fixed_point: {type(response).__name__} follows iterations, but steps=0 makes none; use AID(…)."
        )
    return FixedPoint(call, int(steps), response, _random.checked_seed("fixed_point", seed))


@dataclass(frozen=True)
class FixedPoint:
    """A differentiable solution map, made by `fixed_point`."""

    map: Call
    steps: int
    response: BestResponse
    seed: int

    def __call__(self, init: Tree, /, *inputs: Tree, batch: Any = None, **named: Tree) -> Tree:
        """Return the solution.

        Args:
            init: where the iteration starts, a tree of floating-point tensors.
            *inputs: the inputs, in the map's order.
            batch: what the map's argument `batch` receives.
            **named: inputs by name.

        Returns:
            A tree like init.

        Raises:
            ParameterError: inputs are missing or too many, or not as expected.
            FuncmloError: something else is not as expected.
        """
        owner = "fixed_point"
        x = operands.named(owner, self.map.levels, inputs, named)
        operands.check_init(owner, init)
        operands.constant_batch(owner, batch)
        if (BATCH in self.map.sources) != (batch is not None):
            raise ParameterError(
                f"{owner}: the map {'takes' if batch is None else 'has no argument'} batch, but "
                f"{'none came: pass batch=…' if batch is None else 'one came; leave it out'}."
            )
        if callable(batch):
            raise ParameterError(f"{owner}: the batch is a function, but all iterations take one batch; pass that.")
        init, x, batch = operands.ordinary((init, x, batch))
        autocast = precision.surrounding(init)
        with precision.apart(), operands.reading(owner, init, x, batch):
            return self._solve(owner, init, x, batch, autocast)

    def _solve(self, owner: str, init: Tree, x: dict[str, Tree], batch: Any, autocast: torch.dtype | None) -> Tree:
        differentiable, fixed = operands.split(owner, x)
        constants, whole = _tree.partition((fixed, batch))

        def phi(constants: list[Tensor], y: Tree, x: dict[str, Tree]) -> Tree:
            fixed, data = whole(constants)
            with precision.evaluating(autocast, y), _random.seeded(_random.step_seed(self.seed, owner, 0)):
                new = self.map(y, values={**fixed, **x, BATCH: data})
            if autocast is not None:
                new = precision.raised(new, y)
            if difference := _tree.mismatch(y, new):
                raise ParameterError(f"{owner}: what the map returned and its first argument differ: {difference}.")
            return new

        operands.check_closures(owner, [self.map.function], lambda y, x: phi(constants, y, x), init, differentiable)
        if self.response.in_the_open:
            with torch.set_grad_enabled(_tracing.recording(init, differentiable)):
                return self._iterate(phi, constants, init, differentiable)

        def find(kept: tuple[list[Tensor], Tree], init: Tree, x: dict[str, Tree]) -> Tree:
            with torch.no_grad():
                return self._iterate(phi, kept[0], operands.begun(x, kept[1], init), x)

        start, inputs, begin = operands.beginning(self.response, init, differentiable)
        if not _tracing.recording(inputs):
            return find((constants, begin), start, inputs)
        solution = SolutionMap(owner, self.response, find, lambda *given: self._solved(phi, *given))
        return solution((constants, begin), start, inputs)

    def _iterate(self, phi: Phi, constants: list[Tensor], y: Tree, x: dict[str, Tree]) -> Tree:
        for _ in range(self.steps):
            y = phi(constants, y, x)
        return y

    def _solved(self, phi: Phi, kept: tuple[list[Tensor], Tree], x: dict[str, Tree], y: Tree) -> Solved:
        """The fixed point as estimators see it: the condition y − Φ(y, x) = 0."""
        owner, (constants, begin) = "fixed_point", kept
        return Solved(
            params=y,
            opt_state=(),
            inputs=x,
            init=(operands.begun(x, begin, y), ()),
            steps=self.steps,
            loss=_no_loss,
            update=lambda at, state, x, t=None: (phi(constants, at, x), state),
            start=lambda x: (operands.begun(x, begin, y), ()),
            optimizer=STATELESS,
            seed=operands.drawn_seed(self.seed, owner, x, y) if self.response.claims.stochastic else self.seed,
            condition=Closed(lambda c, at, x: _tree.subtract(at, phi(c, at, x)), constants),
        )


Phi = Callable[[list[Tensor], Tree, dict[str, Tree]], Tree]


def _no_loss(*args: Any, **kwargs: Any) -> NoReturn:
    del args, kwargs
    raise EstimatorError("fixed_point: an estimator asked for the loss, and a fixed point has none; use AID(…) or ITD().")
