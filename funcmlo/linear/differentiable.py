"""w = A⁻¹v as a function that can be differentiated again: of v, and of what A is computed from.

For a condition F(y, x) the operator is A(y, x) = (∂F/∂y)ᵀ. Its solution's differential is dw = A⁻¹(dv − dA w), so a
cotangent g on w asks for one more solve, with Aᵀ:

    u = A⁻ᵀg,    v̄ = u,    (ȳ, x̄) = −∇_{y,x} ⟨u, A(y, x) w⟩.

The solve in the backward pass is this same function, so that derivatives of every order come out right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from funcmlo import _diff, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.operators import Operator, with_transpose

NO_FORWARD_MODE = (
    "an implicit response has no forward-mode derivative (jvp, jacfwd, hessian); use reverse mode (grad, vjp, jacrev)."
)

Condition = Callable[[Tree, Tree, Tree], Tree]
"""F(constants, y, x), a tree like y."""


@dataclass(frozen=True)
class System:
    """The system (∂F/∂y)ᵀ w = v, or the transposed one.

    Attributes:
        solver: how it is solved.
        condition: F.
        symmetric: whether ∂F/∂y is symmetric.
        transposed: whether the system is ∂F/∂y w = v instead.
        point: the solved level that F belongs to, which the operator carries; None where there is none.
    """

    solver: LinearSolver
    condition: Condition
    symmetric: bool = True
    transposed: bool = False
    point: Any = None

    def within(self, constants: Tree, y: Tree, x: Tree, body: Callable[[Operator, _diff.Pullback], Tree]) -> Tree:
        """Do something with the matrix-free operator at (y, x).

        Args:
            constants: the tensors that F needs besides y and x.
            y: where ∂F/∂y is taken.
            x: the inputs there.
            body: receives the operator, and F's pullback, which serves the cross product too.

        Returns:
            What the body returns.
        """

        def with_operator(value: Tree, extra: Any, pullback: _diff.Pullback) -> Tree:
            del value, extra

            def matvec(u: Tree) -> Tree:
                return pullback(u, wrt=[0])[0]

            plain = Operator(matvec, like=y, symmetric=self.symmetric, point=self.point)
            if self.symmetric or not (self.transposed or self.solver.needs_transpose):
                return body(plain, pullback)

            def both_ways(operator: Operator) -> Tree:
                assert operator.transpose is not None
                if not self.transposed:
                    return body(operator, pullback)
                return body(replace(operator, matvec=operator.transpose, transpose=operator.matvec), pullback)

            return with_transpose(plain, both_ways)

        return _diff.with_vjp(lambda at, inputs: (self.condition(constants, at, inputs), None), [y, x], with_operator)


def solve(system: System, constants: Tree, y: Tree, x: Tree, v: Tree) -> Solution:
    """Solve the system, differentiably by y, x and v.

    Args:
        system: what is solved.
        constants: the tensors that F needs besides y and x; nothing is differentiated by them.
        y: where ∂F/∂y is taken.
        x: the inputs there.
        v: the right-hand side, a tree like y.

    Returns:
        w with its statistics.

    Raises:
        EstimatorError: something that is traced is closed over instead of handed in.
    """
    leaves, structure = _tree.flatten((constants, y, x, v))
    call = _Call(system, structure)
    *w, residual, converged, negative, iterations = _Solve.apply(call, *leaves)  # type: ignore[no-untyped-call]
    value = _tree.unflatten(_tree.structure(v), w)
    return Solution(value, iterations, residual, converged, negative, products=call.products[-1])


@dataclass(frozen=True)
class _Call:
    """One solve: the system, how its operands are laid out, and how many products it took."""

    system: System
    structure: Any
    products: list[int] = field(default_factory=list)


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *operands: Tensor) -> tuple[Tensor, ...]:
        constants, y, x, v = _tree.unflatten(call.structure, operands)

        def body(operator: Operator, pullback: _diff.Pullback) -> Tree:
            del pullback
            found = call.system.solver.solve(operator, v)
            call.products.append(found.products)
            stats = (found.residual, found.converged, found.negative_curvature, found.iterations)
            return _tree.leaves(found.value), [torch.as_tensor(x).clone() for x in stats]

        w, stats = call.system.within(constants, y, x, body)
        return *w, *stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *operands = inputs
        ctx.call = call
        ctx.mark_non_differentiable(*output[-4:])
        ctx.save_for_backward(*operands, *output[:-4])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, _tracing.alive(ctx.saved_tensors)
        count = call.structure.num_leaves
        constants, y, x, v = _tree.unflatten(call.structure, saved[:count])
        w = _tree.unflatten(_tree.structure(v), saved[count:])
        g = _tree.unflatten(_tree.structure(v), _tracing.alive(cotangents[:-4]))
        system: System = call.system
        other = replace(system, transposed=not system.transposed)
        u = solve(other, constants, y, x, g).value

        # ⟨u, A w⟩ = ⟨Aᵀu, w⟩: of the two factors, the pullback is applied to the one that (∂F/∂y)ᵀ multiplies.
        left, right = (w, u) if system.transposed else (u, w)

        def inner_product(at: Tree, inputs: Tree) -> tuple[Tensor, None]:
            product = _diff.with_vjp(
                lambda y: (system.condition(constants, y, inputs), None), [at], lambda _, __, pullback: pullback(right)[0]
            )
            return _tree.dot(left, product), None

        _, _, (y_bar, x_bar), _ = _diff.value_and_grads(inner_product, [y, x])
        none = [None] * len(_tree.leaves(constants))
        return (None, *none, *_tree.leaves(_tree.negative((y_bar, x_bar))), *_tree.leaves(u))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        del ctx, tangents
        raise EstimatorError(NO_FORWARD_MODE)
