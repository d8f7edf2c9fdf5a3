"""The Hessian of the level's loss, or the derivative of a problem's own condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from funcmlo import _diff, _forward, _tracing, _tree, precision
from funcmlo._tree import Tree
from funcmlo.curvature.base import Body, Curvature
from funcmlo.curvature.cross import check_loss, difference_quotient, gradient, mixed_difference, mixed_product
from funcmlo.curvature.weightless import weightless
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator, with_transpose

Products = Literal["kept", "recompute", "forward", "finite_difference"]


@dataclass(frozen=True)
class Hessian(Curvature):
    """H = ∇²_yy g; for a problem with a condition F of its own, such as a fixed point, (∂F/∂y)ᵀ.

    Four ways to a product Hu, and the rule for choosing one:

    - ``"kept"`` (the default): the graph of ∇_y g is built once and walked for every product and for the cross product;
      one product costs about one and a half gradients. Take it unless one of the others' reasons holds.
    - ``"recompute"``: the graph is built for each product and freed: two and a half gradients a product, and the graph is
      not held while the solver works.
    - ``"forward"``: forward mode over reverse mode: three gradients a product and no graph of the gradient, so on deep
      networks and large batches the least memory of the exact ways; needs forward derivatives of everything in the loss.
    - ``"finite_difference"``: [∇g(y + εu) − ∇g(y − εu)] / 2ε, two gradients: for losses whose kernels have no second
      derivative; half the digits.

    Args:
        products: which one.

    Raises:
        DefinitionError: there is no such way.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> lean = fm.AID(fm.CG(20), curvature=Hessian(products="forward"))
        >>> solve = fm.argmin(lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.5), steps=1, response=lean)
        >>> torch.func.grad(lambda x: (solve(torch.zeros(2), x) ** 2).sum())(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])

    References:
        Pearlmutter 1994, Fast exact multiplication by the Hessian; Pedregosa 2016, arXiv 1602.02355.
    """

    products: Products = "kept"

    def __post_init__(self) -> None:
        """Refuse an unknown way, and say what the chosen one can."""
        if self.products not in get_args(Products):
            raise DefinitionError(
                f"Hessian(products={self.products!r}): expected {', '.join(map(repr, get_args(Products)))}."
            )
        object.__setattr__(self, "differentiable", self.products == "kept")
        object.__setattr__(self, "total", self.products != "forward")  # a solution has no forward-mode derivative
        object.__setattr__(self, "assumes", frozenset() if self.products == "kept" else frozenset({"minimization"}))
        object.__setattr__(self, "second_order", self.products != "finite_difference")
        object.__setattr__(self, "exact", self.products != "finite_difference")

    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with Hw = v; see the base class."""
        if self.products == "kept":
            return self._kept(solved, cotangent, body, transpose)
        check_loss(f"Hessian(products={self.products!r})", solved)
        y, x = solved.params, solved.inputs

        def recompute(u: Tree) -> Tree:
            return _diff.with_vjp(
                lambda at: (weightless(gradient(solved, at, x)), None), [y], lambda _, __, back: back(u)[0]
            )

        def forward(u: Tree) -> Tree:
            return _forward.jvp_of_gradients(lambda at: (solved.loss(at, x), None), [y], 0, u)[0]

        def difference(u: Tree) -> Tree:
            length = _tree.norm(u)
            epsilon = precision.epsilon(u, solved.autocast) ** 0.5 * (1 + _tree.norm(y)) / torch.where(length > 0, length, 1)
            with torch.no_grad():
                ahead, behind = (gradient(solved, _tree.add_scaled(y, e, u), x) for e in (epsilon, -epsilon))
            return difference_quotient(ahead, behind, epsilon)

        def crossed(w: Tree) -> dict[str, Tree]:
            if self.products == "finite_difference":
                return mixed_difference(solved, w)
            if self.products == "recompute":
                return mixed_product(solved, w)
            products = _forward.jvp_of_gradients(lambda at, inputs: (solved.loss(at, inputs), None), [y, x], 0, w)
            return dict(_tree.negative(products[1]))

        matvec = {"recompute": recompute, "forward": forward, "finite_difference": difference}[self.products]
        return body(Operator(matvec, like=y), cotangent, crossed)

    def _kept(self, solved: Solved, cotangent: Tree, body: Body, transpose: bool) -> Tree:
        made = None if solved.products is None or _tracing.recording(cotangent) else solved.products()
        if made is not None:
            return body(Operator(made.hessian, like=solved.params), cotangent, lambda w: _tree.negative(made.cross(w)))

        def condition(y: Tree, x: dict[str, Tree]) -> tuple[Tree, None]:
            return weightless(gradient(solved, y, x) if solved.condition is None else solved.condition(y, x)), None

        def opened(value: Tree, extra: Any, pullback: _diff.Pullback) -> Tree:
            del value, extra
            symmetric = solved.condition is None
            operator = Operator(lambda u: pullback(u, wrt=[0])[0], like=solved.params, symmetric=symmetric)

            def with_operator(operator: Operator) -> Tree:
                return body(operator, cotangent, lambda w: dict(_tree.negative(pullback(w, wrt=[1])[0])))

            return with_transpose(operator, with_operator) if transpose and not symmetric else with_operator(operator)

        return _diff.with_vjp(condition, [solved.params, solved.inputs], opened)
