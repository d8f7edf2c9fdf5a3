"""Implicit derivatives from dense matrices: what matrix-free estimators are held against.

With F(y, x) = 0 at the solution (F = ∇_y g, or y − Φ(y, x)): Jᵀv = −(∂F/∂x)ᵀ (∂F/∂y)⁻ᵀ v.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from funcmlo import _random
from funcmlo._argmin import Argmin
from funcmlo._fixed_point import FixedPoint
from funcmlo._tree import Tree
from funcmlo.batches import Feed, feeds
from funcmlo.binding import bound
from funcmlo.dependence import dependence
from funcmlo.errors import EstimatorError, FuncmloWarning, ParameterError
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel, unravel
from funcmlo.problem import Problem
from funcmlo.signature import BATCH
from funcmlo.state import State
from funcmlo.testing.subjects import cotangent_like, func_grad, inputs_of, wide, wide_state

Condition = Callable[[Tensor, dict[str, Tree]], Tensor]

_AWAY = 1e-2
"""A solution that a Newton step moves by more, relative to 1 + ‖y‖, is none."""
"""F(y, inputs), on flat y."""


def dense_implicit(thing: Any, /, *arguments: Any, **keywords: Any) -> Any:
    """Return implicit derivatives from dense Jacobians, solved directly; in float64, for small problems.

    - `dense_implicit(loss, params, inputs, cotangent)`: −(∂²g/∂y∂x)ᵀ H⁻¹ v for every input of
      `loss(params, inputs)`, a dict.
    - `dense_implicit(program, state, batches, of="x")`: the hypergradient of a level, the state's parameters being taken as
      the solutions of the levels below. For `composition="paths"` eq. 2 is summed path by path; for `"nested"` the composed
      implicit maps are differentiated, and the state must hold solutions of the total costs.
    - `dense_implicit(solve, solution, *inputs, batch=None, cotangent=None)`: for what `fm.argmin` and `fm.fixed_point`
      return, a dict by input name; with (∂_xΦ)ᵀ (I − ∂_yΦ)⁻ᵀ v for a fixed point.

    Only costs and maps are looked at: projections, optimizers and starts have no part in it.

    Args:
        thing: a loss, a program, or a solution map.
        *arguments: as above.
        **keywords: `of`, `batch`, `cotangent`, and inputs by name.

    Returns:
        A dict of trees by input name, or a tree like the level's parameters.

    Raises:
        EstimatorError: the Hessian, or I − ∂_yΦ, is singular.
        ParameterError: the arguments are not as expected.

    Example:
        >>> import torch, funcmlo as fm
        >>> loss = lambda y, inputs: (y**2 - y * inputs["x"]).sum()
        >>> dense_implicit(loss, torch.ones(2), {"x": 2 * torch.ones(2)}, torch.ones(2))["x"]
        tensor([0.5000, 0.5000], dtype=torch.float64)

    References:
        Choe et al. 2023 (Betty), arXiv 2207.02849, eq. 2.
    """
    if isinstance(thing, Multilevel):
        return _of_program(thing, *arguments, **keywords)
    if isinstance(thing, (Argmin, FixedPoint)):
        return _of_solve(thing, *arguments, **keywords)
    return _of_loss(thing, *arguments, **keywords)


def _of_loss(loss: Callable[..., Tensor], params: Tree, inputs: dict[str, Tree], cotangent: Tree) -> dict[str, Tree]:
    y = wide(params)
    return _products("the loss", _stationarity(loss, y), ravel(y), wide(inputs), ravel(cotangent_like(y, cotangent)))


def _of_solve(
    solve: Argmin | FixedPoint, solution: Tree, *inputs: Tree, batch: Any = None, cotangent: Tree = None, **by_name: Tree
) -> dict[str, Tree]:
    y, data = wide(solution), wide(batch)
    vectors, x = inputs_of(solve, inputs, by_name)
    if isinstance(solve, Argmin):
        problem = Problem(solve.level, data if callable(data) else lambda t: data, solve.seed, 0, x)
        last = max(int(solve.level.steps) - 1, 0)
        condition = _stationarity(lambda at, z: problem.cost(at, z, last)[0], y)
    else:
        condition = _steadiness(solve, y, x, data)
    return _products(type(solve).__name__.lower(), condition, ravel(y), vectors, ravel(cotangent_like(y, cotangent)))


def _stationarity(loss: Callable[..., Tensor], like: Tree) -> Condition:
    """Return ∇_y g as a condition."""

    def condition(y: Tensor, x: dict[str, Tree]) -> Tensor:
        gradient: Tensor = torch.func.grad(lambda at: loss(unravel(at, like), x))(y)
        return gradient

    return condition


def _steadiness(solve: FixedPoint, like: Tree, fixed: dict[str, Tree], batch: Any) -> Condition:
    """Return y − Φ(y, x) as a condition."""

    def condition(y: Tensor, x: dict[str, Tree]) -> Tensor:
        with _random.seeded(_random.step_seed(solve.seed, "fixed_point", 0)):
            return y - ravel(solve.map(unravel(y, like), values={**fixed, **x, BATCH: batch}))

    return condition


def _products(name: str, condition: Condition, y: Tensor, x: dict[str, Tree], v: Tensor) -> dict[str, Tree]:
    """−(∂F/∂x)ᵀ (∂F/∂y)⁻ᵀ v for every input."""
    w = _solved(name, torch.func.jacrev(lambda at: condition(at, x))(y).T, v)
    answers = {}
    for source, tree in x.items():

        def product(at: Tree, source: str = source) -> Tensor:
            return -condition(y, {**x, source: at}) @ w

        answers[source] = func_grad(product, tree)
    return answers


def _solved(name: str, matrix: Tensor, right: Tensor) -> Tensor:
    try:
        solution: Tensor = torch.linalg.solve(matrix, right)
        return solution
    except LinAlgError as error:
        raise EstimatorError(
            f"dense_implicit: the Jacobian of {name}'s condition is singular, so its solution has no implicit derivative "
            "there; regularize."
        ) from error


def _of_program(program: Multilevel, state: State, batches: Any, *, of: str) -> Tree:
    program.graph.check(of)
    if not isinstance(state, State):
        raise ParameterError(f"expected the State that program.init returns; {type(state).__name__} came.")
    state, batches = wide_state(state, batches)
    part = program.levels[: program.graph.levels.index(of) + 1]
    feed = feeds(part, program.graph.levels, batches, state.step, pure=True, tasks=program._plan.roles.tasks)
    solved = _Solved(program, state, feed)
    for level in part:  # what a loss makes once and keeps must not be made inside a transform
        solved.cost(level.name, state.params[level.name], solved.reads(level.name), ahead=level.name == of)
    return solved.by_nesting(of) if program.composition == "nested" else solved.by_paths(of)


@dataclass(frozen=True)
class _Solved:
    """A program whose lower levels stand at their solutions."""

    program: Multilevel
    state: State
    feed: dict[str, Feed]

    def cost(self, name: str, own: Tree, inputs: dict[str, Tree], *, ahead: bool) -> Tensor:
        """A level's cost at its next step, or at the last one that it made."""
        level = next(level for level in self.program.levels if level.name == name)
        last = 0 if ahead or not self.state.step[name] else -1
        return bound(level, self.feed, self.state, self.program._plan.roles).cost(own, inputs, last)[0]

    def reads(self, name: str) -> dict[str, Tree]:
        level = next(level for level in self.program.levels if level.name == name)
        return {source: self.state.params[source] for source in level.reads_levels}

    def by_paths(self, k: str) -> Tree:
        """Eq. 2: for every path the product of the Jacobians on it."""
        own, graph = self.state.params[k], self.program.graph
        jacobians = {edge: self._jacobian(*edge) for path in graph.paths(k) for edge in zip(path[1:], path, strict=False)}
        total = ravel(func_grad(lambda at: self.cost(k, at, self.reads(k), ahead=True), own))
        for path in graph.paths(k):
            end = path[-1]

            def cost(y: Tree, end: str = end) -> Tensor:
                return self.cost(k, own, {**self.reads(k), end: y}, ahead=True)

            product = ravel(func_grad(cost, self.reads(k)[end]))
            for reader, source in reversed(list(zip(path[1:], path, strict=False))):
                product = jacobians[reader, source].T @ product
            total = total + product
        return unravel(total, own)

    def _jacobian(self, reader: str, source: str) -> Tensor:
        """∂θ*_reader/∂θ_source = −H⁻¹ ∂²C/∂θ_reader∂θ_source, each as a matrix."""
        like, x = self.state.params[reader], self.state.params[source]
        condition = _stationarity(lambda at, z: self.cost(reader, at, {**self.reads(reader), **z}, ahead=False), like)
        y = ravel(like)
        hessian = torch.func.jacrev(lambda at: condition(at, {source: x}))(y)
        mixed = torch.func.jacrev(lambda at: condition(y, {source: unravel(at, x)}))(ravel(x))
        away = float(_solved(f"level '{reader}'", hessian, condition(y, {source: x})).norm())
        if away > _AWAY * (1.0 + float(y.norm())):
            warnings.warn(
                f"dense_implicit: level '{reader}' is not at its solution, which a Newton step puts {away:.2g} away; the "
                "formula holds there only. Hand in a state that is solved.",
                FuncmloWarning,
                stacklevel=2,
            )
        return -_solved(f"level '{reader}'", hessian, mixed)

    def by_nesting(self, k: str) -> Tree:
        """The total derivative: lower solutions as functions, each by Newton steps from where it is known."""
        needed = dependence(self.program.graph).needed
        # n Newton steps from a solution have its derivatives right up to order 2ⁿ − 1, and each depth asks for one more.
        newton = max(1, self.program.graph.levels.index(k).bit_length())

        def total(name: str, own: Tree, values: dict[str, Tree]) -> Tensor:
            values = {**values, name: own}
            for lower in needed[name]:  # the highest first: a solution follows from those above it
                values[lower] = solution(lower, values)
            return self.cost(name, own, {source: values[source] for source in self.reads(name)}, ahead=name == k)

        def solution(name: str, values: dict[str, Tree]) -> Tree:
            like = self.state.params[name]
            y = ravel(like)
            for _ in range(newton):
                condition = torch.func.grad(lambda at: total(name, unravel(at, like), values))
                y = y - _solved(f"level '{name}'", torch.func.jacrev(condition)(y), condition(y))
            return unravel(y, like)

        return func_grad(lambda own: total(k, own, self.state.params), self.state.params[k])
