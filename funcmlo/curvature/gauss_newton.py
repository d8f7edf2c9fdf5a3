"""The generalized Gauss–Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from funcmlo import _diff, _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.curvature.base import Body, Curvature
from funcmlo.curvature.cross import check_loss, mixed_product
from funcmlo.errors import DefinitionError, EstimatorError, LossError
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator
from funcmlo.signature import Call, read_call


@dataclass(frozen=True)
class GaussNewton(Curvature):
    """G = J_fᵀ ∇²ℓ(f) J_f for a cost g(y, x) = ℓ(f(y)): the Hessian without the curvature of the network itself.

    G is positive semidefinite wherever ℓ is convex in the outputs, so conjugate gradient is safe on networks that are not
    convex; it equals H where f is linear in y or the residuals vanish. A scalar cost does not say what its outputs are,
    so the two parts are given; the cross product is that of the level's own loss.

    One product costs one Jacobian-vector and one vector-Jacobian product; the outputs' graph is built once.

    Args:
        outputs: `outputs(params, …)` → f, a tensor or a tree of them. Its first argument is the level's own parameters, the
            others are level names and `batch`, as a loss's.
        loss: `loss(f, …)` → ℓ, a 0-d tensor; its first argument is the outputs, the others as before. Together they are
            the level's cost, up to terms whose curvature is left out (a regularizer's is added by `damping=`). For a level
            that is maximized ℓ is the negative of its cost.

    Raises:
        DefinitionError: a function cannot be read.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> def outputs(w, x): return w * x
        >>> def loss(f): return ((f - 1.0) ** 2).sum() / 2
        >>> response = fm.AID(fm.CG(5), curvature=GaussNewton(outputs, loss))
        >>> solve = fm.argmin(lambda w, x: loss(outputs(w, x)), torchopt.sgd(0.25), steps=60, response=response)
        >>> torch.func.grad(lambda x: solve(torch.zeros(1), x).sum())(torch.tensor([2.0]))
        tensor([-0.2500])

    References:
        Schraudolph 2002, Fast curvature matrix-vector products; Martens 2010, Deep learning via Hessian-free optimization.
    """

    outputs: Callable[..., Tree]
    loss: Callable[..., Tensor]

    _outputs: Call = field(init=False, repr=False)
    _loss: Call = field(init=False, repr=False)

    exact: ClassVar[bool] = False
    total: ClassVar[bool] = False
    assumes: ClassVar[frozenset[Assumption]] = frozenset({"minimization", "its own level"})

    def __post_init__(self) -> None:
        """Read the signatures."""
        for name in ("outputs", "loss"):
            function = getattr(self, name)
            if not callable(function):
                raise DefinitionError(f"GaussNewton({name}={function!r}): expected a function.")
            call, _ = read_call(function, None, owner=f"GaussNewton: its {name}", own=True)
            object.__setattr__(self, f"_{name}", call)

    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with Gw = v; see the base class."""
        del transpose
        check_loss("GaussNewton", solved)
        evaluate, x = solved.evaluate, solved.inputs
        if evaluate is None:
            raise EstimatorError("GaussNewton needs the level's batch, which this problem does not hand out; use Hessian().")

        def slope(f: Tree) -> tuple[Tree, None]:
            def cost(at: Tree) -> tuple[Tensor, None]:
                return _scalar(evaluate(self._loss, at, x, is_cost=True)), None

            _, _, (gradient,), _ = _diff.value_and_grads(cost, [f])
            return gradient, None

        def with_outputs(f: Tree, _: Any, back: _diff.Pullback) -> Tree:
            def with_push(_: Tree, __: Any, push: _diff.Pullback) -> Tree:
                def with_curvature(_: Tree, __: Any, curve: _diff.Pullback) -> Tree:
                    def matvec(u: Tree) -> Tree:
                        return back(curve(push(u)[0])[0])[0]

                    return body(Operator(matvec, like=solved.params), cotangent, lambda w: mixed_product(solved, w))

                return _diff.with_vjp(slope, [f], with_curvature)

            # u ↦ J_f u is the transpose of the linear map c ↦ J_fᵀ c.
            return _diff.with_vjp(lambda c: (back(c)[0], None), [_tree.zeros_like(f)], with_push)

        return _diff.with_vjp(lambda y: (_vectors(evaluate(self._outputs, y, x)), None), [solved.params], with_outputs)


def _vectors(f: Tree) -> Tree:
    for path, leaf in _tree.named_leaves(f):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            came = f"a tensor of dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise LossError(f"GaussNewton: its outputs{path} are {came}; expected a tree of floating-point tensors.")
    return f


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.dim():
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"GaussNewton: its loss returned {came}; expected a scalar: reduce it with .mean() or .sum().")
    return value
