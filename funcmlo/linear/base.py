"""The interface of the linear solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmlo import _leaves, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError, EstimatorError
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Solution:
    """A linear solver's answer: never without saying how good it is.

    Attributes:
        value: w ≈ H⁻¹v.
        iterations: iterations that changed w.
        residual: ‖v − Hw‖ / ‖v‖ as the solver knows it (0 for v = 0); None where it did not look, as `Identity`.
        converged: whether the residual met the solver's tolerance; None where it did not look.
        negative_curvature: whether a direction of zero or negative curvature was met where the solver bears none.
        products: how often the operator was applied.
        carry: what the next solve starts from, with a warm start.
    """

    value: Tree
    iterations: int | Tensor
    residual: Tensor | None
    converged: Tensor | None
    negative_curvature: Tensor | None
    products: int = 0
    carry: Any = None


@dataclass(frozen=True)
class LinearSolver(ABC):
    """Base of the solvers of Hw = v: frozen configuration.

    A subclass answers `compute`, and `prepare` where something is worth computing once for many right-hand sides.

    Args:
        throw: whether not converging is an error (under torch.func.vmap, where nothing can be raised, NaN).

    Example:
        Ten steps of gradient descent on ½wᵀHw − vᵀw:

        >>> import torch, funcmlo as fm
        >>> from funcmlo.linear import Solution
        >>> class Descent(fm.LinearSolver):
        ...     def compute(self, operator, prepared, rhs, start):
        ...         w = torch.zeros_like(rhs)
        ...         for _ in range(10):
        ...             w = w + 0.5 * (rhs - operator(w))
        ...         residual = (rhs - operator(w)).norm() / rhs.norm()
        ...         return Solution(w, 10, residual, residual < 1e-3, torch.tensor(False))
        >>> solution = Descent().solve(fm.Operator(lambda u: 2 * u, like=torch.zeros(2)), torch.ones(2))
        >>> solution.value, solution.products
        (tensor([0.5000, 0.5000]), 11)
    """

    throw: bool = field(default=False, kw_only=True)

    symmetric_only: ClassVar[bool] = False
    """Whether H must be symmetric."""
    needs_transpose: ClassVar[bool] = False
    """Whether it uses u ↦ Hᵀu of an H that is not symmetric."""
    uses_operator: ClassVar[bool] = True
    """Whether it applies H at all."""
    goes_on: ClassVar[bool] = False
    """Whether it goes on from a `start`."""
    carries_solution: ClassVar[bool] = True
    """Whether what a solution carries is w itself, so that the next start may be extrapolated."""
    inverts: ClassVar[bool] = True
    """Whether its answer approximates H⁻¹v, or is another map of v by design."""
    differentiable: ClassVar[bool] = True
    """Whether its answer can be differentiated again as that of a solve, with all its statistics known."""
    vmap: ClassVar[bool] = True
    """Whether it works on problems mapped by `torch.func.vmap`."""
    data_parallel: ClassVar[bool] = True
    """Whether it sees a level's examples by its operator alone, so that processes can share them."""
    exact: ClassVar[bool] = True
    """Whether its answer reaches H⁻¹v to rounding with ordinary settings (else to its knob's accuracy)."""
    assumes: ClassVar[frozenset[Assumption]] = frozenset({"positive definite"})
    """What it asks of H."""
    knob: ClassVar[str | None] = None
    """The field whose limit takes its answer to H⁻¹v."""

    def __post_init__(self) -> None:
        """Refuse a `throw` that is neither."""
        if not isinstance(self.throw, bool):
            raise DefinitionError(f"{type(self).__name__}(throw={self.throw!r}): expected True or False.")

    @abstractmethod
    def compute(self, operator: Operator, prepared: Any, rhs: Tree, start: Any) -> Solution:
        """Solve Hw = v.

        Args:
            operator: H; its products are counted.
            prepared: what `prepare` returned for it.
            rhs: v, a tree of the space that H acts on.
            start: what an earlier solution carried, for a solver that goes on from there; None to start from zero.

        Returns:
            w with its statistics (`products` is filled in).
        """

    def prepare(self, operator: Operator) -> Any:
        """Return what many right-hand sides share, which `compute` receives; None for nothing.

        Args:
            operator: H.

        Returns:
            Anything.
        """
        del operator
        return None

    def start(self, like: Tree) -> Any:
        """Return the first start of a warm-started solve.

        Args:
            like: a tree of the space that H acts on.

        Returns:
            What stands in for the `carry` of a solution that there was not yet.
        """
        return _tree.zeros_like(like)

    def init(self, operator: Operator) -> Prepared:
        """Prepare for an operator, once for as many right-hand sides as come.

        Args:
            operator: H.

        Returns:
            The solver with the operator, and what was computed once.

        Raises:
            EstimatorError: the solver takes no such operator.
        """
        name = type(self).__name__
        if self.symmetric_only and not operator.symmetric:
            raise EstimatorError(
                f"{name} solves symmetric systems, and this one (a fixed point's I − ∂Φ) is not; use GMRES(…), "
                "NormalEquations(…), Neumann(…, scale=1.0), which sums the map's own powers, or Direct()."
            )
        if self.needs_transpose and not operator.symmetric and operator.transpose is None:
            raise EstimatorError(f"{name} needs u ↦ Hᵀu: give the operator its transpose=, or use GMRES(…).")
        counted, count = _counted(operator)
        prepared = self.prepare(counted)
        return Prepared(self, operator, prepared, count[0])

    def solve(self, operator: Operator, rhs: Tree, *, start: Any = None) -> Solution:
        """Solve Hw = v for one right-hand side.

        Args:
            operator: H.
            rhs: v, a tree of the space that H acts on.
            start: the `carry` of an earlier solution, for a solver that goes on from there.

        Returns:
            w with its statistics, the products of preparing included.

        Raises:
            EstimatorError: the solver takes no such operator; or it did not converge and `throw=True`.
        """
        ready = self.init(operator)
        solution = ready.solve(rhs, start=start)
        return replace(solution, products=solution.products + ready.products)


@dataclass(frozen=True)
class Prepared:
    """A solver with its operator, and what it computed once.

    Attributes:
        solver: the solver.
        operator: H.
        prepared: what many right-hand sides share.
        products: how often the operator was applied for it.
    """

    solver: LinearSolver
    operator: Operator
    prepared: Any
    products: int

    def solve(self, rhs: Tree, *, start: Any = None) -> Solution:
        """Solve Hw = v.

        Args:
            rhs: v.
            start: the `carry` of an earlier solution.

        Returns:
            w with its statistics, without the products of preparing.

        Raises:
            EstimatorError: it did not converge, and the solver says `throw=True`.
        """
        counted, count = _counted(self.operator)
        solution = self.solver.compute(counted, self.prepared, rhs, start if self.solver.goes_on else None)
        return _held(self.solver, replace(solution, products=count[0]))

    def solve_block(self, rhs: Tree) -> Solution:
        """Solve HW = V for a block of right-hand sides at once, by `torch.func.vmap`.

        Args:
            rhs: V; every leaf has the block as an additional first axis.

        Returns:
            A solution whose leaves and statistics have that axis first; `products` counts those of one column.

        Raises:
            EstimatorError: a column did not converge, and the solver says `throw=True`.
        """
        counts: list[int] = []
        shapes: list[Any] = []

        def column(*leaves: Tensor) -> list[Tensor]:
            solution = self.solve(_tree.unflatten(spec, leaves))
            counts.append(solution.products)
            stats = [solution.residual, solution.converged, solution.negative_curvature]
            shapes.append([x is None for x in stats])
            known = [x for x in stats if x is not None]
            return [*_tree.leaves(solution.value), *known, torch.as_tensor(solution.iterations)]

        flat, spec = _tree.flatten(rhs)
        if not flat:
            return self.solve(rhs)
        found = list(torch.func.vmap(column, randomness="same")(*flat))
        value, rest = found[: len(flat)], iter(found[len(flat) :])
        residual, converged, negative = (None if absent else next(rest) for absent in shapes[-1])
        block = Solution(_tree.unflatten(spec, value), next(rest), residual, converged, negative, counts[-1])
        if self.solver.throw and converged is not None and not _tracing.unreadable() and not bool(converged.all()):
            raise EstimatorError(
                f"{type(self.solver).__name__} did not converge for {int((~converged).sum())} of {len(converged)} columns. "
                "Allow more iterations, raise tol= or damping=, or take what was found with throw=False."
            )
        return block


def _counted(operator: Operator) -> tuple[Operator, list[int]]:
    """The operator, and a counter of its products."""
    count = [0]

    def counting(product: Any) -> Any:
        def matvec(u: Tree) -> Tree:
            count[0] += 1
            return product(u)

        return matvec

    transpose = None if operator.transpose is None else counting(operator.transpose)
    return replace(operator, matvec=counting(operator.matvec), transpose=transpose), count


def _held(solver: LinearSolver, solution: Solution) -> Solution:
    """The solution, if the solver may return it."""
    if not solver.throw or solution.converged is None:
        return solution
    if _tracing.unreadable():
        factor = torch.where(solution.converged, 1.0, torch.nan)
        value = _tree.map(lambda x: x * factor.to(x.device, x.dtype), solution.value)
        return replace(solution, value=value)
    if not bool(solution.converged):
        residual = "unknown" if solution.residual is None else f"{float(solution.residual):.2g}"
        flat = ", at a direction of zero or negative curvature" if bool(solution.negative_curvature) else ""
        raise EstimatorError(
            f"{type(solver).__name__} did not converge: relative residual {residual} after {int(solution.iterations)} "
            f"iterations{flat}. Allow more iterations, raise tol= or damping=, or take what was found with throw=False."
        )
    return solution


def may_stop(active: Tensor) -> bool:
    """Say whether to leave a loop: asking is free on a CPU, waits for a GPU, and is impossible for traced values.

    Args:
        active: whether there is something left to do, a 0-d flag.

    Returns:
        Whether it is known that there is not.
    """
    return _leaves.plain((active,)) and not bool(active)
