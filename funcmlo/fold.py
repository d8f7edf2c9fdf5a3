"""The hypergradient of one level: a reverse pass over the graph, vector first (Betty, eq. 2).

    dC_k/dθ_k = ∂C_k/∂θ_k + Σ_paths (best-response Jacobians along the path)ᵀ ∂C_k/∂θ_l*

Cotangents are folded from the highest lower level down; where paths meet their cotangents are added, so each level's
best response is multiplied once, however many paths run through it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funcmlo import _reached, _tracing, _tree, kernels, precision, sharded
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError, FuncmloWarning, listing
from funcmlo.gradients import value_and_grads
from funcmlo.graph import Graph
from funcmlo.hypergrad.base import BestResponse, check_mapped
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.problem import Problem
from funcmlo.sharing import apart
from funcmlo.together import Answer, Together


@dataclass(frozen=True)
class Folded:
    """A level's total gradient, and what came with it.

    Attributes:
        gradient: dC_k/dθ_k, a tree like the level's parameters.
        indirect: its part that comes through the levels below, dC_k/dθ_k − ∂C_k/∂θ_k; None where none does.
        cost: C_k, as the optimizer sees it.
        aux: the loss's metrics.
        response: the new estimator states, by lower level.
        stats: what each best-response product cost, by lower level.
    """

    gradient: Tree
    indirect: Tree | None
    cost: Tensor
    aux: dict[str, Any]
    response: dict[str, Any]
    stats: dict[str, Stats | Mapping[str, Any]]

    def plain_stats(self) -> dict[str, Stats | Mapping[str, Any]]:
        """Return the stats with Python numbers in place of 0-d tensors, wherever values can be read."""
        if _tracing.unreadable():
            return self.stats
        return {name: stats.plain() if isinstance(stats, Stats) else stats for name, stats in self.stats.items()}


def total_gradient(
    graph: Graph,
    problem: Problem,
    params: Mapping[str, Tree],
    solved: Mapping[str, tuple[BestResponse, Solved | Together]],
    response: Mapping[str, Any],
    t: int = 0,
) -> Folded:
    """Return the hypergradient of a level at one of its steps.

    Where every estimator asked synchronizes once, each process makes the whole of it for its own examples; the processes'
    answers are averaged in one exchange.

    Args:
        graph: the program's graph.
        problem: the level k, bound to its batch and seed.
        params: every level's parameters; the lower levels' at their solutions.
        solved: the lower levels with their estimators.
        response: the estimators' states.
        t: the step's number, counted from the problem's first.

    Returns:
        The total gradient with costs and stats.
    """
    sharing = problem.sharing
    if sharing is None or not solved or not all(estimator.synchronizes_once for estimator, _ in solved.values()):
        return _folded(graph, problem, params, solved, response, t)
    with apart():
        own = _folded(graph, problem, params, solved, response, t)
    means = sharing.averaged((own.gradient, own.indirect, own.cost), problem.extent(t))
    return replace(own, **dict(zip(("gradient", "indirect", "cost"), means, strict=True)))


def _folded(
    graph: Graph,
    problem: Problem,
    params: Mapping[str, Tree],
    solved: Mapping[str, tuple[BestResponse, Solved | Together]],
    response: Mapping[str, Any],
    t: int,
) -> Folded:
    k = problem.level.name
    on_path = graph.responding(k)
    below = [name for name in problem.level.cost_levels if name in on_path]
    constant = {name: params[name] for name in problem.level.reads_levels if name not in below}

    def cost(one: Problem, own: Tree, *solutions: Tree) -> tuple[Tensor, dict[str, Any]]:
        return one.cost(own, {**constant, **dict(zip(below, solutions, strict=True))}, t)

    with precision.scaled(problem.level.loss_scale):
        value, aux, (direct, *partials), (_, *used) = value_and_grads(
            problem, cost, [params[k], *(params[n] for n in below)], t
        )
    for name, depends in zip(below, used, strict=True):
        if not depends and _tree.leaves(params[name]):
            warnings.warn(
                f"level '{k}' reads '{name}', but its cost does not depend on it, so nothing of its hypergradient comes "
                f"through '{name}'; is the argument used, and outside torch.no_grad?",
                FuncmloWarning,
                stacklevel=2,
            )

    indirect: Tree | None = None
    cotangents = {name: v for name, v, d in zip(below, partials, used, strict=True) if d}
    states, stats = {}, {}
    for name in reversed(graph.levels):
        if name not in cotangents:
            continue
        estimator, at = solved[name]
        products, states[name], stats[name] = _asked(
            name, estimator, at, cotangents.pop(name), response[name], {k, *on_path}
        )
        for source, cotangent in products.items():
            if source == k:
                indirect = cotangent if indirect is None else _tree.add(indirect, cotangent)
            elif source in on_path:
                cotangents[source] = _tree.add(cotangents[source], cotangent) if source in cotangents else cotangent
    total = direct if indirect is None else _tree.add(direct, indirect)
    return Folded(total, indirect, value, aux, states, stats)


def _asked(
    name: str, estimator: BestResponse, at: Solved | Together, cotangent: Tree, state: Any, wanted: Collection[str]
) -> Answer:
    """An estimator's product through a level, or through all of its tasks."""

    def ask(at: Solved, cotangent: Tree, state: Any) -> Answer:
        check_mapped(f"level '{name}'", estimator)
        with (
            precision.scaled(at.loss_scale),
            sharded.naming(f"level '{name}'", estimator),
            kernels.naming(f"level '{name}'", estimator),
            _reached.reaching(at.inputs) as reached,
        ):
            answer = estimator.vjp(at, cotangent, state)
        for source in reached.missed():
            if source in at.cost_inputs and source in wanted:
                warnings.warn(
                    f"level '{name}' reads '{source}', but the gradient of its cost does not depend on it, so nothing of a "
                    f"hypergradient comes through that; is '{source}' used beside the level's own parameters, and outside "
                    "torch.no_grad, .data and once_differentiable?",
                    FuncmloWarning,
                    stacklevel=2,
                )
        return _checked_answer(name, estimator, at, answer)

    return ask(at, cotangent, state) if isinstance(at, Solved) else at.answer(estimator, ask, cotangent, state)


def _checked_answer(name: str, estimator: BestResponse, at: Solved, answer: Any) -> Answer:
    """Hold an estimator's answer to the interface: it may be a user's first attempt."""
    kind = type(estimator).__name__
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise EstimatorError(
            f"{kind}.vjp for level '{name}' returned {type(answer).__name__}; expected a triple (cotangents by input "
            "name, state, stats)."
        )
    products, state, stats = answer
    if not isinstance(products, Mapping) or set(products) != set(at.inputs):
        came = listing(products) if isinstance(products, Mapping) else type(products).__name__
        raise EstimatorError(
            f"{kind}.vjp for level '{name}' returned cotangents for {came}; expected one for every input: "
            f"{listing(at.inputs)}."
        )
    if not isinstance(stats, (Stats, Mapping)):
        raise EstimatorError(
            f"{kind}.vjp for level '{name}' returned stats of type {type(stats).__name__}; expected fm.Stats."
        )
    for source, cotangent in products.items():
        if difference := _tree.mismatch(at.inputs[source], cotangent):
            raise EstimatorError(
                f"{kind}.vjp for level '{name}': the cotangent of input '{source}' and that input differ: {difference}."
            )
    return dict(products), state, stats
