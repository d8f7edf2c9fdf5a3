"""Steps of an optimizer on the quadratic whose minimum solves the system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmlo import _tree, optim
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.linear.base import LinearSolver, Solution, may_stop
from funcmlo.linear.beginning import rayleigh, rounding
from funcmlo.linear.checks import check_iterations, check_not_negative
from funcmlo.operators import Operator


@dataclass(frozen=True)
class GradientSteps(LinearSolver):
    """Steps of an optimizer on q(w) = ½wᵀHw − vᵀw, whose gradient is Hw − v, from a start (zero without one).

    With a warm start, w and the optimizer's state are carried from one outer step to the next. One step of plain SGD
    is then the single loop w ← w − ρ(Hw − v) of SOBA; a few are AmIGO. Each step costs one product, the first from
    zero none.

    It converges where the optimizer does on q: for SGD of rate ρ < 2/λ_max on a positive definite H. A weight decay μ
    of the optimizer makes it H + μI. A run that diverges is left where it is once its gradient has grown by 1/ε, and
    the next one starts anew. For an H that is not symmetric Hw − v is no gradient, and a step of SGD is Richardson's.

    Its residual is known one step late: the stats give ‖v − Hw‖ / ‖v‖ at the last gradient, before the last step.

    Args:
        optimizer: a torchopt optimizer.
        steps: how many steps.
        tol: the relative residual at which the stats say «converged»; all steps are made in any case.

    Raises:
        DefinitionError: a setting is not what it should be.

    Example:
        >>> import torch, torchopt
        >>> v = torch.tensor([1.0, 1.0])
        >>> operator = Operator(lambda u: torch.tensor([1.0, 2.0]) * u, like=v)
        >>> GradientSteps(torchopt.sgd(0.5), 50).solve(operator, v).value
        tensor([1.0000, 0.5000])

    References:
        Dagréou et al. 2022 (SOBA), arXiv 2201.13409; Arbel and Mairal 2022 (AmIGO), arXiv 2111.14580.
    """

    optimizer: Any
    steps: int
    tol: float = 1e-3

    goes_on: ClassVar[bool] = True
    carries_solution: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    knob: ClassVar[str | None] = "steps"

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        super().__post_init__()
        if not all(callable(getattr(self.optimizer, name, None)) for name in ("init", "update")):
            raise DefinitionError(
                f"GradientSteps(optimizer={self.optimizer!r}): expected a torchopt optimizer such as torchopt.sgd(0.1)."
            )
        check_iterations("GradientSteps", self.steps, "steps")
        check_not_negative("GradientSteps", tol=self.tol)

    def start(self, like: Tree) -> tuple[Tree, Any]:
        """Return zero with the optimizer's first state.

        Args:
            like: a tree of the space that H acts on.

        Returns:
            w and the state.
        """
        zero = _tree.zeros_like(like)
        return zero, optim.mend(self.optimizer).init(zero)

    def compute(self, operator: Operator, prepared: None, rhs: Tree, start: tuple[Tree, Any] | None) -> Solution:
        """Make the steps.

        Args:
            operator: H.
            prepared: nothing.
            rhs: v.
            start: w and the optimizer's state, as an earlier solution carried them.

        Returns:
            w with its statistics; a zero v gives zero at once.
        """
        del prepared
        update, fresh = optim.mend(self.optimizer).update, self.start(rhs)
        w, state = fresh if start is None else start
        v_norm = _tree.norm(rhs)
        some = ~(v_norm <= torch.finfo(v_norm.dtype).tiny)
        active, divisor = some, torch.where(some, v_norm, 1)
        negative = diverged = torch.zeros_like(some)
        residual, iterations = torch.zeros_like(v_norm), torch.zeros_like(v_norm, dtype=torch.int64)
        bound = torch.ones_like(v_norm)

        for k in range(self.steps):
            if may_stop(active):
                break
            if k == 0 and start is None:
                gradient = _tree.negative(rhs)
            else:
                product = operator(w)
                gradient = _tree.subtract(product, rhs)
                if operator.symmetric:
                    # What is small beside ‖v‖ is rounding too: in a null space ‖Hw‖ is nothing else.
                    length, scale = _tree.norm(w), torch.maximum(_tree.norm(product), v_norm)
                    flat = rayleigh(w, product, length) < -rounding(rhs) * scale / length
                    negative = negative | (active & flat)
            residual = torch.where(active, _tree.norm(gradient) / divisor, residual)
            if k == 0:
                # What was carried from a much larger v has not diverged.
                bound = residual.clamp(min=1) / _tree.coarsest_epsilon(rhs)
            updates, new_state = update(gradient, state, params=w)
            new = optim.apply(w, updates)
            # NaN is neither: it goes on into w.
            diverged = diverged | (active & ((residual > bound) | torch.isinf(_tree.norm(new))))
            active = active & ~diverged
            w, state = _chosen(active, new, w), _chosen(active, new_state, state)
            iterations = iterations + active

        w = _tree.where(some, w, fresh[0])
        carry = _chosen(diverged, fresh, (w, state))
        return Solution(w, iterations, residual, (residual <= self.tol) & ~diverged, negative, carry=carry)


def _chosen(condition: Tensor, a: Any, b: Any) -> Any:
    """`where` for an optimizer's state, which may hold more than tensors (of b)."""
    return _tree.map(lambda x, y: torch.where(condition.to(x.device), x, y) if isinstance(x, Tensor) else y, a, b)
