"""A quasi-Newton inner optimizer whose memory lasts over outer steps, and serves the linear solve as its preconditioner.

An inner loop moves from y to y + s and sees its gradient change by u ≈ Hs. With m such pairs, S and U having them as rows, R
the upper triangle of SUᵀ and D its diagonal, the BFGS matrix that begins at γI is (Byrd, Nocedal and Schnabel 1994)

    B g = γg + Sᵀ R⁻ᵀ((D + γUUᵀ) R⁻¹Sg − γUg) − γUᵀR⁻¹Sg,        γ = sᵀu / uᵀu of the newest pair.

B ≈ H⁻¹. From one outer step to the next H hardly changes, so the pairs are kept. Ramzi et al. 2022 (SHINE, arXiv 2106.00553)
take B in place of H⁻¹ in the hypergradient; here it preconditions the conjugate gradient, which leaves no bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo.linear.preconditioner import Preconditioner
from funcmlo.operators import Operator, ravel, unravel


class Memory(NamedTuple):
    """The optimizer's state.

    Attributes:
        moves: S, (m, p), each of length one, the newest last; zeros where there is no pair yet.
        changes: U, (m, p), on the same scale.
        cross: SUᵀ, (m, m).
        gram: UUᵀ, (m, m).
        point: where the last gradient was taken, (p,).
        gradient: that gradient, (p,).
        updates: how many were made, 0-d.
    """

    moves: Tensor
    changes: Tensor
    cross: Tensor
    gram: Tensor
    point: Tensor
    gradient: Tensor
    updates: Tensor

    def inverse(self, g: Tensor, rate: float) -> Tensor:
        """Return Bg.

        Args:
            g: a vector, (p,).
            rate: γ as long as there is no pair.

        Returns:
            A vector, (p,).
        """
        lengths, newest = self.cross.diagonal(), self.gram[-1, -1]
        some = newest > 0
        gamma = torch.where(some, lengths[-1] / torch.where(some, newest, 1), rate)
        upper = self.cross.triu() + torch.diag((lengths == 0).to(g.dtype))
        a, b = self.moves @ g, self.changes @ g
        c = torch.linalg.solve_triangular(upper, a[:, None], upper=True)[:, 0]
        inner = lengths * c + gamma * (self.gram @ c - b)
        d = torch.linalg.solve_triangular(upper.T, inner[:, None], upper=False)[:, 0]
        found: Tensor = gamma * g + d @ self.moves - gamma * (c @ self.changes)
        return found

    def learned(self, point: Tensor, gradient: Tensor, steps: int) -> Memory:
        """Return the memory with the pair between the last gradient and this one.

        Args:
            point: y, (p,).
            gradient: ∇_y g there, (p,).
            steps: updates of an inner loop; two gradients of different loops are of different costs, and make no pair.

        Returns:
            The memory; without the pair where its curvature sᵀu is not positive beyond rounding.
        """
        s, u = point - self.point, gradient - self.gradient
        now = self._replace(point=point, gradient=gradient, updates=self.updates + 1)
        if not (self.updates % steps > 0 and s @ u > 1e-4 * s.norm() * u.norm()):
            return now
        scale = 1 / s.norm()
        s, u = scale * s, scale * u
        moves, changes = torch.cat([self.moves[1:], s[None]]), torch.cat([self.changes[1:], u[None]])
        cross, gram = torch.zeros_like(self.cross), torch.zeros_like(self.gram)
        cross[:-1, :-1], gram[:-1, :-1] = self.cross[1:, 1:], self.gram[1:, 1:]
        cross[:, -1] = moves @ u  # the lower triangle of SUᵀ is not looked at
        gram[:, -1] = gram[-1] = changes @ u
        return now._replace(moves=moves, changes=changes, cross=cross, gram=gram)


def quasi_newton(memory: int, steps: int, rate: float) -> GradientTransformation:
    """Return L-BFGS as a transformation of gradients: full steps −Bg, with no line search.

    Args:
        memory: m, the pairs that are kept, over the ends of inner loops.
        steps: the level's `steps`.
        rate: of the first step, which is one of gradient descent.

    Returns:
        The pair of `init` and `update`.
    """

    def init(params: Any) -> Memory:
        p = ravel(params)
        pairs, square = p.new_zeros(memory, len(p)), p.new_zeros(memory, memory)
        return Memory(pairs, pairs, square, square, p, torch.zeros_like(p), torch.zeros((), dtype=torch.int64))

    def update(updates: Any, state: Memory, *, params: Any) -> tuple[Any, Memory]:
        gradient = ravel(updates)
        state = state.learned(ravel(params), gradient, steps)
        return unravel(-state.inverse(gradient, rate), params), state

    return GradientTransformation(init, update)


@dataclass(frozen=True)
class Shared(Preconditioner):
    """The inner optimizer's B as the linear solver's preconditioner: it is there already, and costs no product.

    Args:
        rate: the optimizer's.
    """

    rate: float

    def inverse(self, operator: Operator) -> Callable[[Any], Any]:
        """Return r ↦ Br.

        Args:
            operator: H, of which only the optimizer's state at its point is looked at.

        Returns:
            The map.
        """
        memory: Memory = operator.point.opt_state
        return lambda r: unravel(memory.inverse(ravel(r), self.rate), r)
