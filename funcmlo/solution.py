"""A solution as one node of the graph: y* = y*(inputs), whose derivative is a best response.

Two rules make it work under torch.func: everything that is traced comes in as an operand, and the backward pass takes its
derivatives anew, from the operands and the solution, instead of keeping a graph from the forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from funcmlo import _tracing, _tree, kernels, precision
from funcmlo._tree import Tree
from funcmlo.describe import compact
from funcmlo.errors import EstimatorError, FuncmloWarning
from funcmlo.hypergrad.base import BestResponse, check_mapped
from funcmlo.hypergrad.once import once
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.linear.differentiable import NO_FORWARD_MODE

REMEDY = (
    "hand it in as an input, solve(init, …, {name}), where the loss takes it as an argument; or, if nothing is to be "
    "differentiated by it, detach it first."
)


@dataclass(frozen=True)
class SolutionMap:
    """How a solution is found and what answers for its derivative.

    Attributes:
        owner: who solves, for messages.
        response: the estimator.
        find: `find(constants, init, inputs)` → y*.
        at: `at(constants, inputs, y)` → the solved problem that the estimator sees.
        tell: receives each product's stats, or None.
    """

    owner: str
    response: BestResponse
    find: Callable[[Tree, Tree, dict[str, Tree]], Tree]
    at: Callable[[Tree, dict[str, Tree], Tree], Solved]
    tell: Callable[[Stats], None] | None = None

    def __call__(self, constants: Tree, init: Tree, inputs: dict[str, Tree]) -> Tree:
        """Return y*, differentiable by the inputs.

        Args:
            constants: tensors that nothing is differentiated by.
            init: where the solver starts; the solution does not depend on it.
            inputs: the inputs by name.

        Returns:
            The solution, a tree like what `find` returns.

        Raises:
            EstimatorError: a traced tensor was closed over, or forward mode asks for a tangent.
            RuntimeError: the solver's own.
        """
        if any(map(_tracing.carries_tangent, _tree.leaves(inputs))):
            raise EstimatorError(NO_FORWARD_MODE)
        start, start_structure = _tree.flatten(init)
        leaves, structure = _tree.flatten((constants, inputs))
        call = _Call(self, start_structure, structure, [])
        try:
            found = _Solution.apply(call, *start, *leaves)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "INTERNAL ASSERT" not in str(error):
                raise
            raise EstimatorError(
                f"{self.owner}: its loss closes over a tensor that a torch.func transform traces; {REMEDY.format(name='it')}"
            ) from error
        return _tree.unflatten(call.found[-1], found)


@dataclass(frozen=True)
class _Call:
    """One solve: the map, how its operands are laid out, and how the solution is."""

    map: SolutionMap
    start: Any
    structure: Any
    found: list[Any]


class _Solution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *operands: Tensor) -> tuple[Tensor, ...]:
        first = call.start.num_leaves
        constants, inputs = _tree.unflatten(call.structure, operands[first:])
        with _tracing.whole_program(False):
            found = call.map.find(constants, _tree.unflatten(call.start, operands[:first]), inputs)
        leaves, structure = _tree.flatten(found)
        call.found.append(structure)
        return tuple(x.clone() if any(x is y for y in operands) else x for x in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *operands = inputs
        ctx.call = call
        # The start is not kept, and may be written to: the solution does not depend on it.
        ctx.save_for_backward(*operands[call.start.num_leaves :], *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, _tracing.alive(ctx.saved_tensors)
        count = call.structure.num_leaves
        constants, inputs = _tree.unflatten(call.structure, saved[:count])
        y = _tree.unflatten(call.found[-1], saved[count:])
        if any(map(_tracing.batched_by_autograd, cotangents)):
            raise EstimatorError(
                "torch.autograd's own batched gradients (is_grads_batched=True, vectorize=True) do not reach through a "
                "solution; use torch.func.jacrev."
            )
        v = _tree.unflatten(call.found[-1], _tracing.alive(cotangents))
        with _tracing.whole_program(False):
            products = respond(call.map, call.map.at(constants, inputs, y), v)
        none = [None] * (call.start.num_leaves + len(_tree.leaves(constants)))
        return (None, *none, *_tree.leaves({name: products[name] for name in inputs}))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        del ctx, tangents
        raise EstimatorError(NO_FORWARD_MODE)


def respond(map: SolutionMap, solved: Solved, cotangent: Tree) -> dict[str, Tree]:
    """Ask the estimator for its product, inside a backward pass.

    State and stats cannot leave a backward pass, so nothing may be silent: where the linear system met a direction of
    negative curvature, diverged, or is not finite, the cotangents are NaN under a transform and an error outside; where
    it was left far from solved there is a warning outside.

    Args:
        map: the solution map.
        solved: the problem at its solution.
        cotangent: a tree like the solution.

    Returns:
        The cotangents by input name.

    Raises:
        EstimatorError: the product failed.
    """
    response = map.response
    check_mapped(map.owner, response)
    with precision.apart(), precision.scaled(solved.loss_scale), kernels.naming(map.owner, response):
        products, _, stats = response.vjp(solved, cotangent, response.init(solved.params))
    if isinstance(stats, Stats):
        products = _or_nan(map.owner, response, products, stats)
        if map.tell is not None:
            map.tell(stats)
    if not response.claims.differentiable:
        products = once(compact(response), products, (cotangent, solved.params, solved.inputs))
    return products


def _or_nan(owner: str, response: BestResponse, products: dict[str, Tree], stats: Stats) -> dict[str, Tree]:
    """The products; NaN, or an error, where the linear system has no such solution."""
    if stats.residual is None or stats.negative_curvature is None:
        return products
    residual, negative = torch.as_tensor(stats.residual), torch.as_tensor(stats.negative_curvature)
    failed = negative.to(residual.device) | ~(residual <= _DIVERGED)
    if _tracing.transforming():
        # A factor, not a choice: the derivatives of a choice's other branch would be zero instead of NaN.
        masked: dict[str, Tree] = _tree.map(
            lambda x: x * torch.where(failed, torch.nan, 1.0).to(x.device, x.dtype), products
        )
        return masked
    if bool(failed):
        why = (
            "met a direction of zero or negative curvature"
            if bool(negative)
            else f"diverged (residual {float(residual):.2g})"
        )
        raise EstimatorError(
            f"{owner}: the linear solve of {compact(response)} {why}, so there is no strict minimum there, or it is not "
            "reached yet, or the solver does not fit. Make more inner steps, add damping=, lower scale=, or regularize."
        )
    if bool(residual > _UNSOLVED):
        warnings.warn(
            f"{owner}: the linear solve of {compact(response)} stopped at a relative residual of {float(residual):.2g}, so "
            "the derivative is that far from the solution's; raise its iterations, or look at the problem's curvature.",
            FuncmloWarning,
            stacklevel=2,
        )
    return products


# Conjugate gradient's residual may exceed the right-hand side's norm on its way, by up to the root of the condition
# number; a diverging series exceeds everything.
_DIVERGED = 100.0
_UNSOLVED = 0.1
