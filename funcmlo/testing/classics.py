"""Classics of bilevel optimization in one variable each, whose lower solution is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from funcmlo.assumptions import Assumption
from funcmlo.testing.known import Bilevel, until_converged

_STRICT: frozenset[Assumption] = frozenset({"minimization", "positive definite", "nonsingular"})


@dataclass(frozen=True, repr=False, eq=False)
class MitsosBarton(Bilevel):
    """Example 3.19 of Mitsos and Barton: g(y, x) = −xy² + ½y⁴, so y* = √x and J = 1/(2y*); f(x, y) = xy − y + ½y².

    The upper optimum is x ≈ 0.1886, where y* ≈ 0.4343. The lower level has two minima, ±√x; the start decides.

    Args:
        at: x, in (0, 1).

    Example:
        >>> MitsosBarton(0.25).hypergradient()
        tensor(0.2500, dtype=torch.float64)

    References:
        Mitsos and Barton 2006, A test set for bilevel programs, technical report, MIT.
    """

    at: float = 0.5

    assumptions: ClassVar[frozenset[Assumption]] = _STRICT

    @property
    def x(self) -> Tensor:
        """The upper parameter, a 0-d tensor."""
        return torch.tensor(self.at, dtype=torch.float64)

    @property
    def start(self) -> Tensor:
        """Where an inner loop starts: right of the solution, left of 1."""
        return torch.tensor((1 + self.at**0.5) / 2, dtype=torch.float64)

    @property
    def rate(self) -> float:
        """1/L, with L = 6 − 2x the largest g'' between the solution and 1."""
        return 1 / (6 - 2 * self.at)

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance; g'' = 4x at the solution."""
        return until_converged(1 - 4 * self.at * self.rate)

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        return -x * y**2 + y**4 / 2

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        return x * y - y + y**2 / 2

    def solution(self) -> Tensor:
        """Return √x."""
        return self.x.sqrt()

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv."""
        return v / (2 * self.x.sqrt())


@dataclass(frozen=True, repr=False, eq=False)
class Mirrlees(Bilevel):
    """Mirrlees' problem: g(y, x) = −x exp(−(y + 1)²) − exp(−(y − 1)²), f(x, y) = (x − 2)² + (y − 1)².

    ∇_y g = 0 where x = h(y) = e^{4y} (1 − y)/(1 + y), so the point is given by y* and J = 1/h'(y*), with
    h'/h = 4 − 2/(1 − y²). g has a second minimum near −1, which is why the problem was posed: its stationary points
    do not say which y is optimal. For x < 1 the one near 1 is the global minimum.

    Args:
        y: the solution, in (0.96, 1), where x < 1.

    Example:
        >>> round(float(Mirrlees(0.98).x), 4)
        0.5091

    References:
        Mirrlees 1999, The theory of moral hazard and unobservable behaviour: part I, Review of Economic Studies 66(1).
    """

    y: float = 0.98

    assumptions: ClassVar[frozenset[Assumption]] = _STRICT

    @property
    def x(self) -> Tensor:
        """The upper parameter h(y), a 0-d tensor."""
        y = self.solution()
        return torch.exp(4 * y) * (1 - y) / (1 + y)

    @property
    def start(self) -> Tensor:
        """Where an inner loop starts: the other side of the minimum."""
        return torch.tensor(1.2, dtype=torch.float64)

    @property
    def rate(self) -> float:
        """Half of 1/2, where 2 is about the curvature at the solution."""
        return 0.25

    @property
    def steps(self) -> int:
        """Steps that leave about 1e-14 of the start's distance."""
        return until_converged(0.6)

    def inner(self, y: Tensor, x: Tensor) -> Tensor:
        """Return g(y, x)."""
        return -x * torch.exp(-((y + 1) ** 2)) - torch.exp(-((y - 1) ** 2))

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return f(x, y)."""
        return (x - 2) ** 2 + (y - 1) ** 2

    def solution(self) -> Tensor:
        """Return y."""
        return torch.tensor(self.y, dtype=torch.float64)

    def response(self, v: Tensor) -> Tensor:
        """Return Jᵀv."""
        return v / (self.x * (4 - 2 / (1 - self.solution() ** 2)))
