"""The Jacobian of the level's own step: optimizer, momentum and projection included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from funcmlo import _diff, _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.curvature.base import Body, Curvature
from funcmlo.curvature.cross import gradient
from funcmlo.curvature.hessian import Hessian
from funcmlo.errors import EstimatorError
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator, with_transpose


@dataclass(frozen=True)
class FixedPoint(Curvature):
    """F(z, x) = z − Φ(z, x) for the optimizer's own step Φ on z = (parameters, optimizer state).

    At z* = Φ(z*, x) the implicit response is (∂Φ/∂x)ᵀ (I − ∂Φ/∂z)⁻ᵀ (v, 0): it knows what the step knows, so a projection
    or a proximal step (`project=`) at work makes the response that of the constrained or non-smooth problem, where the
    Hessian's would be wrong. The system is not symmetric: take `Neumann(K, scale=1.0)`, whose K products are what K more
    steps would contribute, `GMRES`, `NormalEquations(CG(…))` or `Direct`.

    A proximal step belongs to the step's own length: with momentum μ, whose steps are 1/(1 − μ) times as long, the fixed
    point of a threshold of rate · λ is the lasso of (1 − μ) λ, and the response is that problem's.

    The parameters' part is formed as −u(y, x) for the updates u that the optimizer adds, never as y − (y + u), so that no
    digits cancel in float32: for gradient descent the operator is the learning rate times the Hessian.

    With an adaptive optimizer (Adam, RMSProp, …) the state must remember gradients larger than what is left of them at the
    solution, as after an inner loop. A fresh state (`steps=0`) has ∂u/∂ν ~ 1/|∇g|, a system that no dtype can
    hold: the stats say so. Without a projection or decay, "hessian" is the same response.

    Example:
        The lasso min ½‖w − b‖² + λ‖w‖₁ by proximal gradient steps; dw*/dλ = −sign(w*) on its support and zero off it:

        >>> import torch, torchopt, funcmlo as fm
        >>> def soft_threshold(w, b, lam):
        ...     return torch.sign(w) * torch.relu(w.abs() - 0.5 * lam)
        >>> solve = fm.argmin(
        ...     lambda w, b, lam: ((w - b) ** 2).sum() / 2, torchopt.sgd(0.5), steps=60, project=soft_threshold,
        ...     response=fm.AID(fm.GMRES(10), curvature="fixed_point"),
        ... )
        >>> b = torch.tensor([3.0, 2.0, 0.5])
        >>> torch.func.grad(lambda lam: solve(torch.zeros(3), b, lam).sum())(torch.tensor(1.0))
        tensor(-2.0000)

    References:
        Grazzi et al. 2020, arXiv 2006.16218; Bertrand et al. 2020 (Lasso), arXiv 2002.08943; Bolte et al. 2021 (non-smooth
        implicit differentiation), arXiv 2106.04350.
    """

    symmetric: ClassVar[bool] = False
    assumes: ClassVar[frozenset[Assumption]] = frozenset()
    sees_step: ClassVar[bool] = True

    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with (I − ∂Φ/∂z)ᵀ w = (v, 0); see the base class."""
        if solved.condition is not None:  # a fixed point of a map has its own
            return Hessian().within(solved, cotangent, body, transpose=transpose)
        parts = solved.parts
        if parts is None:
            raise EstimatorError(
                "curvature='fixed_point' looks at the optimizer's step, and an outside solver has none; use 'hessian'."
            )
        memory, whole = _tree.floating(solved.opt_state)

        def condition(z: tuple[Tree, list[Tensor]], x: dict[str, Tree]) -> tuple[Tree, None]:
            y, kept = z
            u, state = parts.updates(y, whole(kept), x, gradient(solved, y, x), None)
            moved = _tree.negative(u)
            excess = parts.excess(_tree.add(y, u), x, None)
            if excess is not None:  # (P − I)(y + u): zero to the bit where P lets a coordinate be
                moved = _tree.subtract(moved, excess)
            return (moved, _tree.subtract(kept, _tree.floating(state)[0])), None

        def opened(value: Tree, extra: Any, pullback: _diff.Pullback) -> Tree:
            del extra
            operator = Operator(lambda w: pullback(w, wrt=[0])[0], like=_tree.detach(value), symmetric=False)
            rhs = (cotangent, _tree.zeros_like(memory))

            def with_operator(operator: Operator) -> Tree:
                return body(operator, rhs, lambda w: dict(_tree.negative(pullback(w, wrt=[1])[0])))

            return with_transpose(operator, with_operator) if transpose else with_operator(operator)

        return _diff.with_vjp(condition, [(solved.params, memory), solved.inputs], opened)
