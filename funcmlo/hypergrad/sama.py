"""SAMA: the finite-difference response through the optimizer's own adaptation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from funcmlo._tree import Tree
from funcmlo.curvature.cross import check_loss, mixed_difference
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.adaptation import adaptation
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.finite_difference import check_scale
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats


@dataclass(frozen=True)
class SAMA(BestResponse):
    """Jᵀv ≈ −[∇_x g(y* + εw, x) − ∇_x g(y* − εw, x)] / 2ε with w = −(∂u/∂g)ᵀ v, for the optimizer's update u(g).

    The derivative of one step of the optimizer at the solution, by a central difference: no second derivative of the
    network. The optimizer's own derivative comes from automatic differentiation, so it holds for every torchopt optimizer
    and chain of them, at its present moments, with its bias corrections and its learning rate; where a second moment is
    zero its root is taken to be constant, so nothing is infinite. (With Adam a parameter that never had a gradient
    weighs rate/eps, and one ε serves all of w: where its v is not zero, few digits are left of the others; take
    `AID(OptimizerIdentity())`.) Cost: three gradients and one pass through the optimizer.

    It is `AID(OptimizerIdentity(), cross="finite_difference")` under the paper's name.

    Args:
        scale: None chooses the step ε from the dtype and the norms; a number c sets ε = c/‖w‖. See `FiniteDifference`.
        synchronize: with `Multilevel(parallel="data")`: `"always"` averages each gradient over the processes, so that the
            answer is that of one process with all examples; `"end"` lets each process make its hypergradient of its own
            examples and averages those, in one exchange, as the paper does. The mean of products of means is not the
            product of means: the two differ as the processes' gradients do.

    Raises:
        DefinitionError: the scale is not positive, or synchronize is neither.

    Example:
        For gradient descent with rate 1/2 the response is half of the identity-inverse one:

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=60, response=SAMA()),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(2, dtype=torch.float64), "x": torch.ones(2, dtype=torch.float64)})
        >>> [round(float(g), 6) for g in program.hypergradient(state, {}, of="x")]
        [1.0, 1.0]

    References:
        Choe et al. 2023, Making scalable meta learning practical, arXiv 2310.05674.
    """

    scale: float | None = None
    synchronize: Literal["always", "end"] = "always"

    requires: ClassVar[Requires] = "solution"
    claims: ClassVar[Claims] = Claims(target="step", exact=False, knob="scale", assumes=frozenset({"minimization"}))
    second_order: ClassVar[bool] = False
    uses_optimizer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check_scale("SAMA", self.scale)
        if self.synchronize not in ("always", "end"):
            raise DefinitionError(f"SAMA(synchronize={self.synchronize!r}): expected 'always' or 'end'.")
        if self.synchronizes_once:
            object.__setattr__(self, "claims", replace(self.claims, data_parallel=False))

    @property
    def synchronizes_once(self) -> bool:
        """Whether processes average finished hypergradients alone."""
        return self.synchronize == "end"

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return the central difference of ∇_x g along w, for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: the level has no loss, or no optimizer.
        """
        check_loss("SAMA", solved)
        w = adaptation(solved, cotangent)
        return mixed_difference(solved, w, self.scale), state, Stats(gradients=3)
