"""Approximate implicit differentiation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from funcmlo import _diff, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.solved import Closed, Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.linear.base import LinearSolver
from funcmlo.linear.differentiable import Condition, System, solve
from funcmlo.operators import Operator


@dataclass(frozen=True)
class AID(BestResponse):
    """Jᵀv = −∇²_xy g · H⁻¹v, from the solution alone (the implicit function theorem at ∇_y g(y*, x) = 0).

    For a problem with a condition F(y*, x) = 0 of its own, such as a fixed point, −(∂_xF)ᵀ (∂_yF)⁻ᵀ v.

    H = ∇²_yy g is the Hessian of the level's loss. What the optimizer adds to it (decoupled or coupled weight decay)
    and what `project=` cuts off are not in the loss and not in H; put regularizers into the loss.

    Cost: the inner gradient's graph is built once and serves every Hessian-vector product and the cross product of
    all inputs together. Memory: that graph and a few vectors, whatever the number of inner steps.

    Args:
        solver: how Hw = v is solved: `CG`, `Neumann`, `Direct`.

    Raises:
        DefinitionError: the solver is not a linear solver.

    Example:
        y* = x for g = (y − x)²/2, so the response passes the cotangent on:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=AID(fm.CG(5))),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2), "x": torch.tensor([1.0, 2.0])})
        >>> program.hypergradient(state, {}, of="x")
        tensor([2., 4.])

    References:
        Pedregosa 2016, arXiv 1602.02355; Lorraine et al. 2020, arXiv 1911.02590; Grazzi et al. 2020, arXiv 2006.16218.
    """

    solver: LinearSolver

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="implicit", differentiable=True)

    def __post_init__(self) -> None:
        """Refuse what is no linear solver."""
        if not isinstance(self.solver, LinearSolver):
            raise DefinitionError(
                f"AID(solver={self.solver!r}): expected a linear solver such as CG(20), Neumann(20, scale=0.1) or Direct()."
            )

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return −∇²_xy g · H⁻¹v for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.
        """
        constants, condition = _condition(solved)
        y, x = solved.params, solved.inputs
        system = System(self.solver, condition, symmetric=solved.condition is None)
        again = _tracing.recording(constants, y, x, cotangent)

        def body(operator: Operator, pullback: _diff.Pullback) -> Tree:
            # Outside of other derivatives one graph serves the products with the curvature and the cross product.
            w = solve(system, constants, y, x, cotangent) if again else self.solver.solve(operator, cotangent)
            (product,) = pullback(w.value, wrt=[1])
            return product, w.products, w.iterations, w.residual, w.converged, w.negative_curvature

        product, hvps, iterations, residual, converged, negative_curvature = system.within(constants, y, x, body)
        stats = Stats(
            hvps=hvps,
            gradients=1,
            iterations=iterations,
            residual=residual,
            converged=converged,
            negative_curvature=negative_curvature,
        )
        return _tree.negative(product), state, stats


def _condition(solved: Solved) -> tuple[Tree, Condition]:
    """F(constants, y, x) = 0 at the solution: ∇_y g, or the problem's own condition."""
    given = solved.loss if solved.condition is None else solved.condition
    closed = given if isinstance(given, Closed) else Closed(lambda _, y, x: given(y, x), ())

    def gradient(constants: Tree, y: Tree, x: Tree) -> Tree:
        _, _, (gradient,), _ = _diff.value_and_grads(lambda at: (closed.function(constants, at, x), None), [y])
        return gradient

    return closed.constants, gradient if solved.condition is None else closed.function
