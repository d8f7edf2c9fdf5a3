"""What a best response is: the interface of every hypergradient estimator.

Notation: lower cost g(y, x), its solution y*(x), J = ∂y*/∂x. An estimator answers Jᵀv for every input x at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo._tree import Tree

Requires = Literal["solution", "trajectory", "replay"]
Target = Literal["implicit", "unrolled", "identity"]


@dataclass(frozen=True)
class Claims:
    """What an estimator promises, and so what it is checked for.

    Attributes:
        target: what it converges to: the implicit formula −∇²_xy g H⁻¹v, the derivative of the unrolled inner steps,
            or the identity-inverse formula −∇²_xy g v.
        exact: whether it reaches its target to rounding on a converged problem (else to its knob's accuracy).
        stochastic: whether its answer depends on random draws; it is then unbiased for its target.
        knob: the field whose limit takes it to its target, such as ``"iterations"``; None without one.
        differentiable: whether its answer can be differentiated again, as `composition="nested"` and nested `argmin` do.
    """

    target: Target = "implicit"
    exact: bool = True
    stochastic: bool = False
    knob: str | None = None
    differentiable: bool = False


@dataclass(frozen=True)
class Stats:
    """What best-response products cost, and how far their linear system was solved.

    Fields are read as attributes or by name, `stats["hvps"]`, as from the plain dict that an estimator may return instead.

    Attributes:
        hvps: Hessian-vector products.
        gradients: gradients of the lower cost.
        steps: inner steps that were differentiated.
        iterations: iterations of the linear solver.
        residual: ‖v − Hw‖ / ‖v‖ of the linear system as the solver knows it; None without a system.
        converged: whether the solver met its tolerance; None without a system.
        negative_curvature: whether the solver met a direction of zero or negative curvature and stopped there.
        products: how many products Jᵀv these numbers are the sum of.
    """

    hvps: int = 0
    gradients: int = 0
    steps: int = 0
    iterations: int | Tensor | None = None
    residual: float | Tensor | None = None
    converged: bool | Tensor | None = None
    negative_curvature: bool | Tensor | None = None
    products: int = 1

    def __getitem__(self, name: str) -> Any:
        """Return a field by its name.

        Args:
            name: the field's name.

        Returns:
            Its value.

        Raises:
            KeyError: there is no such field.
        """
        names = [f.name for f in fields(self)]
        if name not in names:
            raise KeyError(f"{name!r} is no statistic; there are {', '.join(names)}")
        return getattr(self, name)

    def __add__(self, other: Stats) -> Stats:
        """Return the stats of both together: counts added, the larger residual, converged only if both are."""

        def both(name: str, join: Callable[[Any, Any], Any]) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            return b if a is None else a if b is None else join(a, b)

        counts = {name: getattr(self, name) + getattr(other, name) for name in ("hvps", "gradients", "steps", "products")}
        return Stats(
            **counts,
            iterations=both("iterations", lambda a, b: a + b),
            residual=both("residual", max),
            converged=both("converged", lambda a, b: a and b),
            negative_curvature=both("negative_curvature", lambda a, b: a or b),
        )

    def plain(self) -> Stats:
        """Return the same stats with Python numbers in place of 0-d tensors (waits for the device)."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers: dict[str, Any] = {name: x.item() for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **numbers)


class Trajectory(Protocol):
    """The recorded inner run."""

    @property
    def states(self) -> tuple[tuple[Tree, Tree], ...]:
        """(parameters, optimizer state) before the first step and after each one; values only."""

    def pullback(self, cotangent: Tree) -> dict[str, Tree]:
        """Return (∂y_T/∂input)ᵀ cotangent for every input, through all inner steps and the start of the loop."""


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
        update: `update(params, opt_state, inputs, t)`, the inner step t ∈ {0, …, T − 1} with its own batch and
            randomness: returns (params, opt_state).
        start: `start(inputs)`, where the inner loop begins as a function of the inputs: (params, opt_state).
        optimizer: the level's optimizer, a torchopt transformation that is pure and differentiable.
        trajectory: the recorded inner run, for an estimator with `requires = "trajectory"`; None otherwise.
        condition: `condition(params, inputs)`, a tree like params that vanishes at the solution, for a problem that is
            no minimization (a fixed point); None for ∇_y loss.
    """

    params: Tree
    opt_state: Tree
    inputs: dict[str, Tree]
    init: tuple[Tree, Tree]
    steps: int
    loss: Callable[..., Tensor] = field(repr=False)
    update: Callable[[Tree, Tree, dict[str, Tree], int], tuple[Tree, Tree]] = field(repr=False)
    start: Callable[[dict[str, Tree]], tuple[Tree, Tree]] = field(repr=False)
    optimizer: GradientTransformation = field(repr=False)
    trajectory: Trajectory | None = field(default=None, repr=False)
    condition: Callable[[Tree, dict[str, Tree]], Tree] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class BestResponse(ABC):
    """Base of the estimators: frozen configuration, explicit state.

    A subclass answers `vjp`; it says in `requires` what it needs besides the solution (`"trajectory"`: the recorded
    inner run; `"replay"`: that every inner step can be run again by `Solved.update`), and in `claims` what the checks
    may hold it to.

    Example:
        An estimator that takes the inverse Hessian to be the identity, in one product:

        >>> import torch, funcmlo as fm
        >>> class Identity(fm.BestResponse):
        ...     requires = "solution"
        ...     claims = fm.Claims(target="identity")
        ...     def vjp(self, solved, cotangent, state):
        ...         def inner_gradient(inputs):
        ...             return torch.func.grad(lambda y: solved.loss(y, inputs))(solved.params)
        ...         _, pullback = torch.func.vjp(inner_gradient, solved.inputs)
        ...         (product,) = pullback(cotangent)
        ...         return {name: -x for name, x in product.items()}, state, fm.Stats(hvps=1)
        >>> Identity()
        Identity()
    """

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims()

    def init(self, params: Tree) -> Any:
        """Return the estimator's initial state for a level with these parameters; None when it keeps nothing."""
        del params
        return None

    @abstractmethod
    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats | Mapping[str, Any]]:
        """Return (∂θ*/∂input)ᵀ · cotangent for every input of the level.

        Args:
            solved: the lower level at its solution.
            cotangent: a tree like `solved.params`.
            state: what `init` or the last call returned.

        Returns:
            The cotangents by input name (each a tree like that input), the new state, and the stats.
        """
