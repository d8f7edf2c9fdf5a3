"""A small network with a strict local minimum: the non-convex problem whose response is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.assumptions import Assumption
from funcmlo.errors import DefinitionError
from funcmlo.operators import ravel, unravel
from funcmlo.testing.known import Bilevel, linear_solve, normals, until_converged


@dataclass(frozen=True, repr=False, eq=False)
class Network(Bilevel):
    """A network y = {"w": W, "v": v} of one hidden layer, a ↦ vᵀ tanh(Wa), whose targets and decays are learned.

    g(y, x) = (1/2n) Σ_i (vᵀ tanh(W a_i) − t_i)² + ½ (exp(d_1) ‖W‖² + exp(d_2) ‖v‖²), with x = {"decay": d, "targets": t};
    f(x, y) is the squared error on other data. g is not convex: at y = 0 its Hessian is indefinite. The solution is a
    strict local minimum, found by Newton's method and polished to rounding; `response` is a solve with the dense Hessian.

    Args:
        seed: decides all numbers.
        hidden: the number of hidden units.
        examples: n.

    Raises:
        DefinitionError: this seed leads to no strict minimum.

    Example:
        >>> import torch
        >>> from funcmlo.testing.network import Network
        >>> bool((torch.linalg.eigvalsh(Network().hessian) > 0).all())
        True
    """

    seed: int = 0
    hidden: int = 2
    examples: int = 6

    assumptions: ClassVar[frozenset[Assumption]] = frozenset({"minimization", "positive definite", "nonsingular"})

    def __post_init__(self) -> None:
        """Refuse a seed without a strict minimum."""
        gradient = torch.func.grad(self.inner)(self.solution(), self.x)
        if float(torch.linalg.vector_norm(ravel(gradient))) > 1e-13 or float(self._eigenvalues[0]) < 0.02:
            raise DefinitionError(
                f"Network(seed={self.seed}) has no strict minimum where Newton's method ends; take another."
            )

    @cached_property
    def _drawn(self) -> tuple[Tensor, Tensor, Tensor, Tree, Tree]:
        normal = normals(self.seed)
        a, a_ = normal(self.examples, 2), normal(self.examples, 2)

        def truth(a: Tensor) -> Tensor:
            return 4 * torch.sin(a[:, 0]) - 3 * a[:, 1]

        x = {"decay": normal(2) / 4 - 1, "targets": truth(a) + normal(self.examples) / 4}
        return a, a_, truth(a_), x, {"w": normal(self.hidden, 2), "v": normal(self.hidden)}

    @property
    def x(self) -> Tree:
        """The upper parameters at which everything is evaluated."""
        return self._drawn[3]

    def inner(self, y: Tree, x: Tree) -> Tensor:
        """Return g(y, x)."""
        error = torch.tanh(self._drawn[0].to(y["w"]) @ y["w"].T) @ y["v"] - x["targets"]
        norms = torch.stack([(y["w"] ** 2).sum(), (y["v"] ** 2).sum()])
        cost: Tensor = (error**2).mean() / 2 + 0.5 * torch.exp(x["decay"]) @ norms
        return cost

    def outer(self, x: Tree, y: Tree) -> Tensor:
        """Return f(x, y)."""
        _, a, truth = (part.to(y["w"]) for part in self._drawn[:3])
        error: Tensor = torch.tanh(a @ y["w"].T) @ y["v"] - truth
        return (error**2).mean() / 2

    def _cost(self, flat: Tensor) -> Tensor:
        return self.inner(unravel(flat, self._drawn[4]), self.x)

    def _second(self, flat: Tensor) -> Tensor:
        second: Tensor = torch.func.jacrev(torch.func.grad(self._cost))(flat)
        return second

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """The minimum, flat, and the Hessian there."""
        y = ravel(self._drawn[4])
        for _ in range(100):
            # With the absolute eigenvalues of the Hessian the step descends everywhere, and is Newton's near a minimum.
            gradient = torch.func.grad(self._cost)(y)
            eigenvalues, q = torch.linalg.eigh(self._second(y))
            step = -q @ ((q.T @ gradient) / eigenvalues.abs().clamp(min=0.05))
            size = float(torch.linalg.vector_norm(step))
            if size < 1e-15:
                break
            while size > 1e-6 and self._cost(y + step) > self._cost(y) + 0.1 * gradient @ step:
                step = step / 2
            y = y + step
        return y, self._second(y)

    @property
    def hessian(self) -> Tensor:
        """The Hessian at the solution."""
        return self._solved[1]

    @cached_property
    def _eigenvalues(self) -> Tensor:
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.hessian)
        return eigenvalues

    @property
    def start(self) -> Tree:
        """Where an inner loop starts: near the solution, because there are other minima."""
        return unravel(
            self._solved[0] + 0.05 * torch.cos(torch.arange(len(self._solved[0]), dtype=torch.float64)), self._drawn[4]
        )

    @property
    def rate(self) -> float:
        """1/λ_max at the solution, less what the Hessian changes on the way."""
        return 0.8 / float(self._eigenvalues[-1])

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance."""
        return until_converged(1 - self.rate * float(self._eigenvalues[0]))

    def solution(self) -> Tree:
        """Return y*(x) to rounding."""
        return unravel(self._solved[0], self._drawn[4])

    def response(self, v: Tree) -> Tree:
        """Return Jᵀv = −(∂²g/∂y∂x)ᵀ H⁻¹ v."""
        w = linear_solve(self.hessian, ravel(v))

        def product(x: Tree) -> Tensor:
            return ravel(torch.func.grad(self.inner)(self.solution(), x)) @ w

        return {name: -p for name, p in torch.func.grad(product)(self.x).items()}
