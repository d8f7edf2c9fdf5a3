"""Approximate implicit differentiation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from funcmlo import _diff, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.curvature import Curvature, FixedPoint, Hessian
from funcmlo.curvature.base import Cross
from funcmlo.curvature.cross import check_loss, mixed_difference
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.adaptation import adaptation
from funcmlo.hypergrad.base import BestResponse, Claims, Requires, Target
from funcmlo.hypergrad.solved import Closed, Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.hypergrad.warm import Drift
from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.differentiable import Condition, System, solve
from funcmlo.linear.kfac import KFAC
from funcmlo.linear.nystrom import Nystrom
from funcmlo.linear.optimizer_identity import OptimizerIdentity
from funcmlo.operators import Operator

_CURVATURES: dict[str, Curvature] = {"hessian": Hessian(), "fixed_point": FixedPoint()}


@dataclass(frozen=True)
class AID(BestResponse):
    """Jᵀv = −∇²_xy g · H⁻¹v, from the solution alone (the implicit function theorem at ∇_y g(y*, x) = 0).

    For a problem with a condition F(y*, x) = 0 of its own, such as a fixed point, −(∂_xF)ᵀ (∂_yF)⁻ᵀ v. Three parts are
    put together: a linear solver, a curvature operator, and the cross product.

    With the Hessian, H = ∇²_yy g is that of the level's loss alone. What the optimizer adds to it (decoupled or coupled
    weight decay) and what `project=` cuts off are not in the loss and not in H: put regularizers into the loss, or take
    `curvature="fixed_point"`, which looks at the optimizer's step with its projection.

    Cost: the inner gradient's graph is built once and serves every Hessian-vector product and the cross product of
    all inputs together. Memory: that graph and a few vectors, whatever the number of inner steps.

    Args:
        solver: how Hw = v is solved: `CG`, `Neumann`, `Nystrom`, `MINRES`, `GMRES`, `NormalEquations`, `GradientSteps`,
            `Direct`, `Identity`, `OptimizerIdentity`, `KFAC`.
        curvature: which H: `"hessian"`, `"fixed_point"`, or a value: `Hessian(products=…)`, `GaussNewton(outputs, loss)`,
            `FixedPoint()`, `Damped(λ, …)`, `Resampled(…)`.
        cross: `"autodiff"`, or `"finite_difference"` for a central difference of ∇_x g along w, which needs no second
            derivative.
        warm_start: whether each solve starts from the last outer step's solution, which is then carried in the program's
            state. The cotangent and H move slowly, so at equal tolerance it saves a half to nine tenths of the products.

    Raises:
        DefinitionError: the parts do not fit together.

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
    curvature: Literal["hessian", "fixed_point"] | Curvature = "hessian"
    cross: Literal["autodiff", "finite_difference"] = "autodiff"
    warm_start: bool = False

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="implicit", differentiable=True)

    def __post_init__(self) -> None:
        """Refuse parts that do not fit, and work out what the parts together claim."""
        if not isinstance(self.solver, LinearSolver):
            raise DefinitionError(
                f"AID(solver={self.solver!r}): expected a linear solver such as CG(20), Neumann(20, scale=0.1) or Direct()."
            )
        if not isinstance(self.curvature, Curvature) and self.curvature not in tuple(_CURVATURES):
            raise DefinitionError(
                f"AID(curvature={self.curvature!r}): expected 'hessian', 'fixed_point', or a value such as "
                "GaussNewton(outputs, loss)."
            )
        if self.cross not in ("autodiff", "finite_difference"):
            raise DefinitionError(f"AID(cross={self.cross!r}): expected 'autodiff' or 'finite_difference'.")
        solver, curvature = self.solver, self._curvature
        name = type(solver).__name__
        if solver.symmetric_only and not curvature.symmetric:
            raise DefinitionError(
                f"AID({name}(…), curvature={self.curvature!r}): {name} solves symmetric systems, and a step's I − ∂Φ is "
                "none; use Neumann(…, scale=1.0), GMRES(…), NormalEquations(…) or Direct()."
            )
        if self.cross == "finite_difference" and curvature.sees_step:
            raise DefinitionError(
                f"AID(curvature={self.curvature!r}, cross='finite_difference'): the difference is one of the loss's "
                "gradients, and a step has none; use cross='autodiff'."
            )
        if not isinstance(self.warm_start, bool):
            raise DefinitionError(f"AID(warm_start={self.warm_start!r}): expected True or False.")
        if curvature.stochastic and self.cross == "finite_difference":
            raise DefinitionError(
                f"AID(curvature={self.curvature!r}, cross='finite_difference'): the difference would take the last batch "
                "instead of a fresh one; expected Resampled(Hessian('finite_difference')), which takes both by differences."
            )
        if isinstance(solver, Nystrom) and solver.damping is None:
            raise DefinitionError(
                f"AID({compact(solver)}): damping=None suits a preconditioner, and would be a bias of the size of the least "
                "eigenvalue found; expected Nystrom(…, damping=…) with a small number."
            )
        if self.warm_start and not solver.goes_on:
            raise DefinitionError(
                f"AID({name}(…), warm_start=True): {name} does not go on from a start; use CG, MINRES, GMRES or "
                "GradientSteps."
            )
        object.__setattr__(self, "claims", self._claims())
        object.__setattr__(self, "sees_step", curvature.sees_step)
        adapted = (solver, getattr(solver, "preconditioner", None))
        uses = curvature.sees_step or any(isinstance(part, OptimizerIdentity) for part in adapted)
        object.__setattr__(self, "uses_optimizer", uses)
        object.__setattr__(self, "second_order", curvature.second_order and not self._first_order)
        object.__setattr__(self, "total", curvature.total and not any(isinstance(part, KFAC) for part in adapted))

    @property
    def _first_order(self) -> bool:
        """Whether no second derivative is taken, because no product with the curvature is."""
        return self.cross == "finite_difference" and not self.solver.uses_operator

    @property
    def _curvature(self) -> Curvature:
        return self.curvature if isinstance(self.curvature, Curvature) else _CURVATURES[self.curvature]

    def _claims(self) -> Claims:
        solver, curvature, exact_cross = self.solver, self._curvature, self.cross == "autodiff"
        damped = bool(getattr(solver, "damping", 0.0))
        one_step = isinstance(solver, OptimizerIdentity) or curvature.sees_step
        target: Target = "implicit" if solver.inverts else "step" if one_step else "identity"
        return Claims(
            target=target,
            exact=solver.exact and curvature.exact and exact_cross and not damped,
            stochastic=curvature.stochastic,
            knob=solver.knob,
            differentiable=solver.inverts
            and solver.differentiable
            and isinstance(curvature, Hessian)
            and curvature.differentiable
            and exact_cross,
            vmap=solver.vmap,
            data_parallel=solver.data_parallel and getattr(getattr(solver, "preconditioner", None), "data_parallel", True),
            assumes=self._assumes(),
        )

    def _assumes(self) -> frozenset[Assumption]:
        """What the parts ask of a problem."""
        by_loss: set[Assumption] = {"minimization"} if self.solver.symmetric_only or self.cross != "autodiff" else set()
        return self.solver.assumes | self._curvature.assumes | by_loss

    def init(self, params: Tree) -> Any:
        """Return where the first solve starts, with a warm start; else None.

        Args:
            params: the level's parameters.

        Returns:
            The solver's first start. For a step's fixed point, whose space has the optimizer's state in it, None, which
            stands for zero.
        """
        if not self.warm_start or self._curvature.sees_step:
            return None
        return Drift.begin(params) if self.solver.carries_solution else self.solver.start(params)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return −∇²_xy g · H⁻¹v for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: where the solve starts, with a warm start; else passed through.

        Returns:
            The cotangents by input name, what the next solve starts from, and the stats.

        Raises:
            EstimatorError: the problem does not have what a part looks at; or the solver did not converge and says
                `throw=True`.
        """
        if self.claims.differentiable:
            constants, condition = _condition(solved)
            if _tracing.recording(constants, solved.params, solved.inputs, cotangent):
                return (*self._again(solved, constants, condition, cotangent, state),)
        if self.cross == "finite_difference":
            check_loss("AID(cross='finite_difference')", solved)

        def body(operator: Operator, rhs: Tree, cross: Cross) -> Tree:
            ready = self.solver.init(replace(operator, adapt=lambda v: adaptation(solved, v), point=solved))
            found = ready.solve(rhs, start=state.start() if isinstance(state, Drift) else state if self.warm_start else None)
            products = mixed_difference(solved, found.value) if self.cross == "finite_difference" else cross(found.value)
            return products, found.carry, (found.products + ready.products, *_told(found))

        if self._first_order:
            products, carry, told = body(Operator(_no_product, like=solved.params), cotangent, _no_product)
        else:
            transpose = self.solver.needs_transpose
            products, carry, told = self._curvature.within(solved, cotangent, body, transpose=transpose)
        if self.warm_start:
            drift = isinstance(state, Drift) or self.solver.carries_solution
            state = (state or Drift.begin(carry)).after(carry) if drift else carry
        return products, state, self._stats(*told)

    def _again(
        self, solved: Solved, constants: Tree, condition: Condition, cotangent: Tree, state: Any
    ) -> tuple[dict[str, Tree], Any, Stats]:
        """The same where the answer is differentiated again."""
        y, x = solved.params, solved.inputs
        system = System(self.solver, condition, symmetric=solved.condition is None, point=solved)

        def body(operator: Operator, pullback: _diff.Pullback) -> Tree:
            del operator
            w = solve(system, constants, y, x, cotangent)
            (product,) = pullback(w.value, wrt=[1])
            return _tree.negative(product), (w.products, *_told(w))

        products, told = system.within(constants, y, x, body)
        return products, state, self._stats(*told)

    def _stats(self, hvps: int, *told: Any) -> Stats:
        gradients = 2 if self.cross == "finite_difference" else 1
        gradients += isinstance(self.solver, OptimizerIdentity)  # where the optimizer's update is taken apart
        return Stats(hvps, gradients, **dict(zip(_TOLD, told, strict=True)))


_TOLD = ("iterations", "residual", "converged", "negative_curvature")


def _told(found: Solution) -> tuple[Any, ...]:
    """What a solution says of itself, as a plain tuple: tensors must be able to leave a torch.func transform."""
    return tuple(getattr(found, name) for name in _TOLD)


def _condition(solved: Solved) -> tuple[Tree, Condition]:
    """F(constants, y, x) = 0 at the solution: ∇_y g, or the problem's own condition."""
    given = solved.loss if solved.condition is None else solved.condition
    closed = given if isinstance(given, Closed) else Closed(lambda _, y, x: given(y, x), ())

    def gradient(constants: Tree, y: Tree, x: Tree) -> Tree:
        _, _, (gradient,), _ = _diff.value_and_grads(lambda at: (closed.function(constants, at, x), None), [y])
        return gradient

    return closed.constants, gradient if solved.condition is None else closed.function


def _no_product(u: Tree) -> Tree:
    raise AssertionError("a solver that says uses_operator=False applied the operator")
