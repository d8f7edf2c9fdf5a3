"""Quadratic problems on any graph of levels, and what is known about them without automatic derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torchopt
from torch import Tensor

from funcmlo.graph import Graph
from funcmlo.hypergrad.aid import AID
from funcmlo.level import Level
from funcmlo.linear.direct import Direct
from funcmlo.multilevel import Multilevel
from funcmlo.testing.known import linear_solve, normals
from funcmlo.testing.written import Written

Values = dict[str, Tensor]
"""Every level's parameters."""


@dataclass(frozen=True, repr=False, eq=False)
class Hierarchy(Written):
    """Levels whose costs are quadratic, C_j = ½‖θ_j‖² + a_jᵀθ_j + Σ_s (θ_jᵀBθ_s + ½ θ_sᵀSθ_s + bᵀθ_s) over the s it reads.

    The norms of the B of one level sum to `coupling`, and ‖S‖ is `coupling` times that of its B. With the default 0.4 total
    costs, in which the levels below are at their solutions, stay strictly convex: over 400 random hierarchies their second
    derivatives lay in [0.7, 1.4]. Total costs are quadratic too, so that differences of them are exact derivatives.

    Args:
        reads: by level name, lowest first, the names that its cost reads.
        seed: decides all numbers.
        size: of each level's parameters.
        coupling: how strongly the levels depend on each other.

    Example:
        >>> import torch
        >>> bilevel = Hierarchy({"y": ("x",), "x": ("y",)})
        >>> program = bilevel.program()
        >>> values = bilevel.start(seed=1)
        >>> values |= bilevel.solve_below("x", values)
        >>> gradient = program.hypergradient(program.init(values), {}, of="x", solve=False)
        >>> torch.allclose(gradient, bilevel.total_gradient("x", values))
        True
    """

    reads: Mapping[str, tuple[str, ...]]
    seed: int = 0
    size: int = 2
    coupling: float = 0.4

    @property
    def names(self) -> tuple[str, ...]:
        """The level names, lowest first."""
        return tuple(self.reads)

    @cached_property
    def numbers(self) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
        """(B, S, b) by (level, the level it reads); the third of (level, level) is the level's own a."""
        normal = normals(self.seed)

        def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
            b, s = normal(self.size, self.size), normal(self.size, self.size)
            b, s = b / torch.linalg.matrix_norm(b, 2), s @ s.T / torch.linalg.matrix_norm(s, 2) ** 2
            share = self.coupling / max(1, len(self.reads[name]))
            return share * b, share * self.coupling * s, normal(self.size)

        pairs = [(name, name) for name in self.names]
        pairs += [(name, source) for name, sources in self.reads.items() for source in sources]
        return {pair: draw(pair[0]) for pair in pairs}

    def cost(self, name: str, own: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return C_name at its own parameters and those of the levels that it reads."""
        total = 0.5 * own @ own + self.numbers[name, name][2] @ own
        for source in self.reads[name]:
            b, s, line = self.numbers[name, source]
            x = values[source]
            total = total + own @ b @ x + 0.5 * x @ s @ x + line @ x
        return total

    def levels(self, **fields: Any) -> list[Level]:
        """Return the levels, lowest first.

        Args:
            **fields: of every level; by default gradient descent of rate 0.5 and `AID(Direct())`.

        Returns:
            The levels.
        """
        fields = {"optimizer": torchopt.sgd(0.5), "response": AID(Direct()), **fields}
        return [
            Level(name, self._loss(name), reads={source: source for source in self.reads[name]} or None, **fields)
            for name in self.names
        ]

    def program(self, composition: Literal["paths", "nested"] = "paths", **fields: Any) -> Multilevel:
        """Return the levels as a program.

        Args:
            composition: the program's.
            **fields: of every level, as in `levels`.

        Returns:
            The program.
        """
        return Multilevel(*self.levels(**fields), composition=composition)

    def _loss(self, name: str) -> Callable[..., Tensor]:
        sources = self.reads[name]
        if not sources:
            return lambda own: self.cost(name, own, {})
        return lambda own, *others: self.cost(name, own, dict(zip(sources, others, strict=True)))

    def start(self, seed: int = 0) -> Values:
        """Return random parameters of every level."""
        normal = normals(seed)
        return {name: normal(self.size) for name in self.names}

    def total(self, k: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return T_k, the cost of level k with all levels below it at the solutions of their total costs.

        Args:
            k: a level name.
            values: the parameters of level k and of those above it.

        Returns:
            A 0-d tensor.
        """
        return self.cost(k, values[k], {**values, **self.solve_below(k, values)})

    def solve_below(self, k: str, values: Mapping[str, Tensor]) -> Values:
        """Return the solutions below level k, the highest first, each given those above it."""
        solved: Values = {}
        for name in reversed(self.names[: self.names.index(k)]):
            solved[name] = self._minimize(name, {**values, **solved})
        return solved

    def _minimize(self, name: str, values: Values) -> Tensor:
        """The minimizer of a total cost by one Newton step from 0: differences of a quadratic are exact at any step."""
        n, at = self.size, dict[tuple[int, ...], Tensor]()
        eye = torch.eye(n + 1, dtype=torch.float64)[:, 1:]  # row 0 is zero: no shift

        def total(*shift: int) -> Tensor:
            key = tuple(sorted(shift))
            if key not in at:
                own = sum((eye[abs(i)] if i > 0 else -eye[abs(i)] for i in shift), eye[0])
                at[key] = self.total(name, {**values, name: own})
            return at[key]

        axes = range(1, n + 1)
        gradient = torch.stack([(total(i) - total(-i)) / 2 for i in axes])
        rows = [torch.stack([total(i, j) - total(i) - total(j) + total() for j in axes]) for i in axes]
        return -linear_solve(torch.stack(rows), gradient)

    def total_gradient(self, k: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return ∇T_k by central differences, which are exact for a quadratic.

        Args:
            k: a level name.
            values: the parameters of level k and of those above it.

        Returns:
            A tensor like the level's parameters.
        """
        eye = torch.eye(self.size, dtype=torch.float64)
        moved = [[self.total(k, {**values, k: values[k] + sign * e}) for sign in (1, -1)] for e in eye]
        return torch.stack([(ahead - behind) / 2 for ahead, behind in moved])

    def path_sum(self, graph: Graph, k: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return eq. 2, path by path: the products of local best-response Jacobians, which are −B here.

        Args:
            graph: of the program.
            k: a level name.
            values: the parameters of all levels.

        Returns:
            A tensor like the level's parameters.

        References:
            Choe et al. 2023 (Betty), arXiv 2207.02849, eq. 2.
        """
        answer = values[k] + self.numbers[k, k][2]
        for source in self.reads[k]:
            answer = answer + self.numbers[k, source][0] @ values[source]
        for path in graph.paths(k):
            b, s, line = self.numbers[k, path[-1]]
            cotangent = b.T @ values[k] + s @ values[path[-1]] + line
            for reader, source in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
                cotangent = -self.numbers[reader, source][0].T @ cotangent
            answer = answer + cotangent
        return answer
