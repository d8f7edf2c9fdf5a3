"""The fully first-order penalty method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo import _diff, _tree, optim
from funcmlo._tree import Tree
from funcmlo.curvature.cross import check_loss
from funcmlo.errors import DefinitionError, EstimatorError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.once import once
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.linear.checks import check_iterations

# A run farther than this many times 1 + ‖y*‖ from y* is stopped; a difference over more is no derivative of anything.
_FAR = 10.0
# The relative residual at which the answer counts as converged.
_CONVERGED = 0.01


@dataclass(frozen=True)
class Penalty(BestResponse):
    """Jᵀv = d/ds ∇_x g(y_s, x) at s = 0, where y_s = argmin_y g(y, x) + s⟨v, y⟩: F2SA, inner gradients alone.

    Since dy_s/ds = −H⁻¹v, the derivative is −∇²_xy g H⁻¹v. It is taken by a difference over inner runs that start at y*,
    all with the last step's batch and randomness. Its error is the sum of

    - the difference's, O(σ^order), for g smooth enough;
    - the runs', which end short of y_s: the system Hw = v is solved to the residual that the stats tell. What y* itself
      lacks of a solution moves all runs alike and cancels, but not with order 1, where y* stands for the run with s = 0:
      there the error is of the order of ‖∇_y g(y*)‖/σ;
    - rounding, O(ε/σ) for the machine epsilon ε.

    So it is the implicit hypergradient in the limit of steps → ∞ and then σ → 0. The steps of an optimizer that divides by
    the gradient's size, such as Adam, do not shrink with σ: give a plain one, `optimizer=torchopt.sgd(…)`.

    Cost: `order` inner runs, each with one gradient more. Memory: one inner gradient.

    A run that moves farther than 10 (1 + ‖y*‖) from y*, or is no longer finite, stops where it was last nearer, and the
    stats tell: `converged=False`, and `negative_curvature=True` because there is no minimum near, or the steps are too
    long for one. Zero curvature gives what the steps reached, with a residual near 1. Where `project=` holds the solution
    back, the runs stay in its set and the answer is that of the constrained solution; the part of v that the set takes up
    stays in the residual.

    Args:
        sigma: the size of the perturbation: s = σ/‖v‖, so that it does not depend on the size of v, and y moves by about
            σ‖H⁻¹v‖/‖v‖, whatever ‖y*‖. None chooses σ = ε^(1/(order + 1)) (1 + ‖y*‖), where the difference's error and
            rounding are of one size, for ε of the coarsest dtype among the level and its inputs: with order 2, 0.005
            times that in float32, 6e-6 in float64. Where H is ill-conditioned a smaller one is better.
        steps: of each run; None makes as many as the level made.
        order: p, the order of the difference: 1 for [f(s) − f(0)] / s, or an even number for central differences over
            ±s, …, ±(p/2) s.
        optimizer: what makes the runs' steps; None for the level's own, in a fresh state.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        y* = x for g = (y − x)²/2, so the response passes the cotangent on:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=Penalty(0.125)),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2), "x": torch.tensor([3.0, 4.0])})
        >>> program.hypergradient(state, {}, of="x")
        tensor([6.0000, 8.0000])

    References:
        Kwon et al. 2023 (F2SA), arXiv 2301.10945; Chen, Li and Zhang 2025 (F2SA-p), arXiv 2509.02937; Scellier and Bengio
        2017 (equilibrium propagation), arXiv 1602.05179; Fornberg 1988 for the weights.
    """

    sigma: float | None = None
    steps: int | None = None
    order: int = 2
    optimizer: GradientTransformation | None = None

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="implicit", exact=False, knob="sigma")
    second_order: ClassVar[bool] = False
    steps_again: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        number = isinstance(self.sigma, (int, float)) and not isinstance(self.sigma, bool)
        if self.sigma is not None and not (number and 0 < self.sigma < math.inf):
            raise DefinitionError(f"Penalty(sigma={self.sigma!r}): expected a positive number, or None to choose it.")
        if self.steps is not None:
            check_iterations("Penalty", self.steps, "steps")
        check_iterations("Penalty", self.order, "order")
        if self.order > 1 and self.order % 2:
            raise DefinitionError(f"Penalty(order={self.order!r}): expected 1 or an even number.")
        pair = callable(getattr(self.optimizer, "init", None)) and callable(getattr(self.optimizer, "update", None))
        if self.optimizer is not None and (isinstance(self.optimizer, type) or not pair):
            raise DefinitionError(
                f"Penalty(optimizer={self.optimizer!r}): expected a functional optimizer such as torchopt.sgd(0.1), or None "
                "for the level's own."
            )

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return d/ds ∇_x g(y_s, x) for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats: `residual` is ‖v − Hw‖/‖v‖ for what the difference
            makes of Hw, d/ds ∇_y g(y_s, x) = −Hw, and `converged` says that it is at most 0.01.

        Raises:
            EstimatorError: the level has no loss, no optimizer, or made no steps where `steps` is left to it.
        """
        steps = self._checked_steps(solved)
        y, x, v = solved.params, solved.inputs, cotangent
        with torch.no_grad():
            v_norm = _tree.norm(v)
            size = torch.where(v_norm == 0, 1, v_norm)  # what is not finite stays so, in s and in the answer
            s = self._sigma(solved, v) / size
            slope_y, slope_x = (_tree.map(lambda g: torch.zeros_like(g, dtype=_wide(g, s)), tree) for tree in (y, x))
            near = torch.ones((), dtype=torch.bool, device=s.device)
            weights = stencil(self.order)
            for j, weight in weights.items():
                at, stayed = self._run(solved, _tree.scale(j * s, v), steps) if j else (y, near)
                _, _, (g_y, g_x), _ = _diff.value_and_grads(lambda y, x: (solved.loss(y, x), None), [at, x])
                slope_y, slope_x = _plus(slope_y, weight / s, g_y), _plus(slope_x, weight / s, g_x)
                near = near & stayed.to(near.device)
            nothing = _tree.is_zero(v).to(near.device)
            missing = _tree.norm(_tree.add(slope_y, v)) / size
            residual = torch.where(nothing, torch.zeros_like(missing), missing)
            near = near | nothing
            products = _tree.map(lambda slope, like: slope.to(like.dtype), slope_x, x)
            # Where the gradient at y* is NaN all runs stay there: their difference is no answer.
            products = _tree.scale(torch.where(torch.isfinite(missing), 1.0, torch.nan), products)
            products = _tree.where(nothing, _tree.zeros_like(x), products)
        products = once("Penalty", products, (v, y, x))
        runs = self.order
        stats = Stats(
            gradients=runs * steps + len(weights),
            iterations=runs * steps,
            residual=residual,
            converged=near & (residual <= _CONVERGED),
            negative_curvature=~near,
        )
        return products, state, stats

    def _checked_steps(self, solved: Solved) -> int:
        """How many steps a run makes."""
        check_loss("Penalty", solved)
        if solved.parts is None and self.optimizer is None:
            raise EstimatorError(
                "Penalty makes inner runs of its own, but an outside solver has no steps; give optimizer=torchopt.sgd(…) "
                "and steps=."
            )
        if self.steps is None and not solved.steps:
            raise EstimatorError(
                "Penalty makes as many steps as the level made, but none were made (steps=0, solve=False, or "
                'composition="nested"); give steps=.'
            )
        return solved.steps if self.steps is None else self.steps

    def _sigma(self, solved: Solved, v: Tree) -> Tensor:
        """σ, a 0-d tensor."""
        y_norm = _tree.norm(solved.params)
        if self.sigma is not None:
            return torch.full_like(y_norm, self.sigma)
        return math.pow(solved.epsilon(v), 1 / (self.order + 1)) * (1 + y_norm)

    def _run(self, solved: Solved, shift: Tree, steps: int) -> tuple[Tree, Tensor]:
        """The minimizer of g(y, x) + ⟨shift, y⟩, from y* on, and whether the run stayed near y*."""
        y, x = solved.params, solved.inputs
        own = None if self.optimizer is None else optim.mend(self.optimizer)
        state = (own or solved.optimizer).init(y)
        limit = _FAR * (1 + _tree.norm(y))
        near = torch.ones((), dtype=torch.bool, device=limit.device)
        for _ in range(steps):
            _, _, (gradient,), _ = _diff.value_and_grads(lambda at: (solved.loss(at, x), None), [y])
            gradient = _tree.add(gradient, shift)
            if own is not None:
                if solved.parts is not None and solved.parts.correction is not None:
                    gradient = _tree.add(gradient, solved.parts.correction)
                updates, state = own.update(gradient, state, params=y)
            else:
                # The level's own updates add by themselves what levels below it add to its gradient.
                assert solved.parts is not None
                updates, state = solved.parts.updates(y, state, x, gradient, None)
            new = optim.apply(y, updates)
            excess = None if solved.parts is None else solved.parts.excess(new, x, None)
            if excess is not None:
                new = _tree.add(new, excess)
            # Once away a run stays where it is: data-dependent branches do not live under a map.
            near = near & (_tree.norm(_tree.subtract(new, solved.params)) <= limit)
            y = _tree.where(near, new, y)
        return y, near


def stencil(order: int) -> dict[int, float]:
    """Return the weights w_j of f′(0) ≈ Σ_j w_j f(jh) / h, exact for polynomials of degree `order`.

    The polynomial through the points (jh, f(jh)) has the derivative Σ_j f(jh) ℓ_j′(0) at 0. For j ≠ 0, Lagrange's
    ℓ_j(z) = Π_{k≠j} (z − kh) / (jh − kh) has the root 0, so ℓ_j′(0) = 1/(jh) Π_{k≠0,j} k / (k − j); and ℓ_0′(0) is what
    makes a constant's derivative zero.

    Args:
        order: 1, for the nodes 0 and 1; or even, for 0, ±1, …, ±order/2, among which 0 has no weight.

    Returns:
        The weights that are not zero, by j.

    Example:
        >>> stencil(1), stencil(2)
        ({1: 1.0, 0: -1.0}, {1: 0.5, -1: -0.5})
    """
    nodes = [1] if order == 1 else [sign * j for j in range(1, order // 2 + 1) for sign in (1, -1)]
    weights = {j: math.prod((Fraction(k, k - j) for k in nodes if k != j), start=Fraction(1, j)) for j in nodes}
    weights[0] = -sum(weights.values(), start=Fraction(0))
    return {j: float(weight) for j, weight in weights.items() if weight}


def _wide(x: Tensor, s: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, s.dtype)  # 1/s may be beyond half precision


def _plus(total: Tree, factor: Tensor, g: Tree) -> Tree:
    """The sum total + factor · g in the dtypes of the first."""
    return _tree.map(lambda t, x: t + factor.to(t.device, t.dtype) * x.to(t.dtype), total, g)
