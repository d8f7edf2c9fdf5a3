"""A lower level at its solution: everything that an estimator may use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _tree, precision
from funcmlo._tree import Tree
from funcmlo.sharing import Sharing

Standing = tuple[Tree, Tree]
"""A level's parameters and its optimizer's state."""


@dataclass(frozen=True)
class Keep:
    """Which standings of an inner loop are to be kept as it runs.

    Attributes:
        before: the steps before which the standing is kept, 0 ≤ t < steps.
        on_cpu: whether they are moved to the CPU's memory.
    """

    before: frozenset[int] = frozenset()
    on_cpu: bool = False

    def __or__(self, other: Keep) -> Keep:
        """Return what both ask for."""
        return Keep(self.before | other.before, self.on_cpu or other.on_cpu)


def held(standing: Standing, on_cpu: bool) -> Standing:
    """Return a standing as it is kept.

    Args:
        standing: parameters and optimizer state.
        on_cpu: whether it is moved to the CPU's memory.

    Returns:
        Its values, cut from any graph.
    """
    standing = _tree.detach(standing)
    return _tree.map_tensors(Tensor.cpu, standing) if on_cpu else standing


class Trajectory(Protocol):
    """The recorded inner run."""

    @property
    def states(self) -> tuple[tuple[Tree, Tree], ...]:
        """(parameters, optimizer state) before the first step and after each one; values only."""

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input, through all inner steps and the start of the loop."""


class SecondProducts(Protocol):
    """Products of a cost's second derivatives with vectors, at one point."""

    def hessian(self, v: Tree) -> Tree:
        """Return ∇²_yy g v."""

    def cross(self, v: Tree) -> dict[str, Tree]:
        """Return ∇²_xy g v for every input."""


@dataclass(frozen=True)
class Closed:
    """A function with the tensors that it closes over laid open, so that they can be handed in as operands.

    torch.func's custom derivatives must receive everything that is traced as an operand: a closure over a traced tensor
    is an internal error there, or a silently wrong derivative.

    Attributes:
        function: `function(constants, …)`.
        constants: the tree of tensors, held constant by every derivative.
    """

    function: Callable[..., Any]
    constants: Tree

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with its constants."""
        return self.function(self.constants, *args, **kwargs)


@dataclass(frozen=True)
class Parts:
    """The inner step (y, s) ↦ (P(y + u), s′), (u, s′) = A(y, s, x, ∇_y g_t(y, x)), taken apart.

    Attributes:
        cost: `cost(params, inputs, t)`, g_t with the batch and the randomness of step t; with None for t, the last step's.
        updates: `updates(params, opt_state, inputs, gradient, t)` → (u, opt_state), what the optimizer makes of a gradient.
        excess: `excess(params, inputs, t)`, P(y) − y for the level's projection P; None where it has none.
        correction: what levels below add to the last step's gradient, which `updates` adds by itself; None for nothing.
    """

    cost: Callable[[Tree, dict[str, Tree], int | None], Tensor]
    updates: Callable[[Tree, Tree, dict[str, Tree], Tree, int | None], tuple[Tree, Tree]]
    excess: Callable[[Tree, dict[str, Tree], int | None], Tree]
    correction: Tree = None


@dataclass(frozen=True)
class Solved:
    """A lower level at its solution: everything an estimator may use.

    Attributes:
        params: y*, the level's parameters after the inner steps.
        opt_state: the optimizer's state there.
        inputs: the parameters of every level that this one reads, by name.
        init: (parameters, optimizer state) where the inner loop began.
        steps: the number T of inner steps that were made.
        loss: `loss(params, inputs, draw=None)`, the lower cost g as a 0-d tensor, minimized. It is deterministic: the
            last inner step's batch and randomness; `draw=i` takes the i-th batch after it instead.
        update: `update(params, opt_state, inputs, t=None)`, the inner step t ∈ {0, …, T − 1} with its own batch and
            randomness: returns (params, opt_state). Without t, one step more with the last batch and its randomness.
        start: `start(inputs)`, where the inner loop begins as a function of the inputs: (params, opt_state).
        optimizer: the level's optimizer, a torchopt transformation that is pure and differentiable.
        trajectory: the recorded inner run, for an estimator with `requires = "trajectory"`; None otherwise.
        condition: `condition(params, inputs)`, a tree like params that vanishes at the solution, for a problem that is
            no minimization (a fixed point); None for ∇_y loss.
        parts: the inner step taken apart; None where it has no such parts (a fixed point, an outside solver).
        evaluate: `evaluate(call, first, inputs, draw=None, is_cost=False)`, another function of the level's arguments, with
            the first one in place of the level's parameters, under the batch and the randomness of `loss`; `is_cost` says
            that it is a mean over examples, and its first argument what such a function returned for them.
        kept: the standings that `BestResponse.keep` asked for, by the step before which they are: values only.
        autocast: the 16-bit dtype that the cost is computed in; None for the parameters' own. See `epsilon`.
        loss_scale: the factor under which reverse passes keep 16-bit derivatives in range; None for none.
        cost_inputs: the inputs that the cost itself reads; the others come in by the start, the optimizer or the projection.
        sharing: what processes share of the level; None for nothing.
        products: makes compiled products with ∇²_yy g and ∇²_xy g at the solution, or None where there are none.
        seed: an integer that follows from the program's seed, the level and its step, for estimators that draw.
    """

    params: Tree
    opt_state: Tree
    inputs: dict[str, Tree]
    init: tuple[Tree, Tree]
    steps: int
    loss: Callable[..., Tensor] = field(repr=False)
    update: Callable[..., tuple[Tree, Tree]] = field(repr=False)
    start: Callable[[dict[str, Tree]], tuple[Tree, Tree]] = field(repr=False)
    optimizer: GradientTransformation = field(repr=False)
    trajectory: Trajectory | None = field(default=None, repr=False)
    condition: Callable[[Tree, dict[str, Tree]], Tree] | None = field(default=None, repr=False)
    parts: Parts | None = field(default=None, repr=False)
    evaluate: Callable[..., Any] | None = field(default=None, repr=False)
    kept: Mapping[int, Standing] = field(default_factory=dict, repr=False)
    seed: int = 0
    cost_inputs: tuple[str, ...] = ()
    autocast: torch.dtype | None = None
    loss_scale: float | None = None
    sharing: Sharing | None = None
    products: Callable[[], SecondProducts | None] | None = field(default=None, repr=False)

    def epsilon(self, tree: Tree) -> float:
        """Return the machine epsilon of the cost: of the coarsest dtype among a tree, the inputs and autocast's.

        Args:
            tree: a tree like the parameters.

        Returns:
            The epsilon, from which differences of the cost take their step.
        """
        return precision.epsilon((tree, self.inputs), self.autocast)
