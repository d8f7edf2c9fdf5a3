"""Random hierarchies of quadratic problems, and what is known about them without the library's own derivatives.

Level j's cost is ½‖θ_j‖² + Σ_reads (θ_jᵀ B θ_s + ½ θ_sᵀ S θ_s + bᵀθ_s) + aᵀθ_j. The norms of all B that a level reads by
sum to 0.4, which keeps total costs strictly convex: over 400 random hierarchies their second derivatives lay in
[0.7, 1.4]. Total costs are quadratic then, so that one Newton step from exact differences solves each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torchopt
from hypothesis import strategies as st
from torch import Tensor

import funcmlo as fm

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Hierarchy:
    """Levels `names`, lowest first; reads[name] are the levels that a cost reads; seed and size fix the numbers."""

    reads: dict[str, tuple[str, ...]]
    seed: int
    size: int = 2
    coupling: float = 0.4

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.reads)

    @cached_property
    def numbers(self) -> dict[tuple[str, str], tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def draw(name: str) -> tuple[Tensor, Tensor, Tensor]:
            b, s = normal(self.size, self.size), normal(self.size, self.size)
            b, s = b / torch.linalg.matrix_norm(b, 2), s @ s.T / torch.linalg.matrix_norm(s, 2) ** 2
            coupling = self.coupling / max(1, len(self.reads[name]))
            return coupling * b, coupling * self.coupling * s, normal(self.size)

        pairs = [(name, name) for name in self.names] + [
            (n, source) for n, sources in self.reads.items() for source in sources
        ]
        return {pair: draw(pair[0]) for pair in pairs}

    def cost(self, name: str, own: Tensor, values: Values) -> Tensor:
        total = 0.5 * own @ own + self.numbers[name, name][2] @ own
        for source in self.reads[name]:
            b, s, line = self.numbers[name, source]
            x = values[source]
            total = total + own @ b @ x + 0.5 * x @ s @ x + line @ x
        return total

    def levels(self, **settings: object) -> list[fm.Level]:
        settings = {"response": fm.AID(fm.Direct()), **settings}
        return [
            fm.Level(name, self._loss(name), torchopt.sgd(0.5), reads=self._declared(name), **settings)
            for name in self.names
        ]

    def program(self, composition: str, **settings: object) -> fm.Multilevel:
        return fm.Multilevel(*self.levels(**settings), composition=composition)

    def _declared(self, name: str) -> dict[str, str] | None:
        return {source: source for source in self.reads[name]} or None

    def _loss(self, name: str) -> object:
        sources = self.reads[name]
        if not sources:
            return lambda own: self.cost(name, own, {})
        return lambda own, *others: self.cost(name, own, dict(zip(sources, others, strict=True)))

    def start(self, seed: int) -> Values:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(self.size, generator=generator, dtype=torch.float64) for name in self.names}

    # The oracle: no automatic derivative, no graph, every lower level solved in every total cost.

    def total(self, k: str, own: Tensor, above: Values) -> Tensor:
        """T_k: the cost of level k with all levels below it at their solutions."""
        values = {**above, k: own}
        return self.cost(k, own, {**values, **self.solve_below(k, values)})

    def solve_below(self, k: str, values: Values) -> Values:
        """The solutions below level k, the highest first, each given those above it."""
        solved: Values = {}
        for name in reversed(self.names[: self.names.index(k)]):
            solved[name] = self._minimize(name, {**values, **solved})
        return solved

    def _minimize(self, name: str, above: Values) -> Tensor:
        """The minimizer of a quadratic: its gradient and Hessian are exact differences, whatever the step."""
        n, h = self.size, 1.0
        eye = torch.eye(n, dtype=torch.float64) * h
        at = {}

        def value(*shift: int) -> Tensor:
            key = tuple(sorted(shift))
            if key not in at:
                at[key] = self.total(name, sum((eye[abs(i) - 1] * (1 if i > 0 else -1) for i in shift), 0 * eye[0]), above)
            return at[key]

        gradient = torch.stack([(value(i) - value(-i)) / (2 * h) for i in range(1, n + 1)])
        hessian = torch.stack([
            torch.stack([value(i, j) - value(i) - value(j) + value() for j in range(1, n + 1)]) / h**2
            for i in range(1, n + 1)
        ])
        return -torch.linalg.solve(hessian, gradient)

    def total_gradient(self, k: str, own: Tensor, above: Values) -> Tensor:
        """∇T_k by central differences, which are exact for a quadratic."""
        eye = torch.eye(self.size, dtype=torch.float64)
        return torch.stack([(self.total(k, own + e, above) - self.total(k, own - e, above)) / 2 for e in eye])

    def path_sum(self, graph: fm.Graph, k: str, values: Values) -> Tensor:
        """Eq. 2, path by path: the products of local best-response Jacobians, which are −B here."""
        direct = values[k] + self.numbers[k, k][2]
        for source in self.reads[k]:
            direct = direct + self.numbers[k, source][0] @ values[source]
        for path in graph.paths(k):
            b, s, line = self.numbers[k, path[-1]]
            cotangent = b.T @ values[k] + s @ values[path[-1]] + line
            for reader, source in zip(reversed(path[1:]), reversed(path[:-1]), strict=True):
                cotangent = -self.numbers[reader, source][0].T @ cotangent
            direct = direct + cotangent
        return direct


@st.composite
def hierarchies(draw: st.DrawFn, most: int = 5, least: int = 2) -> Hierarchy:
    """Random reads among up to five levels; the top level reads one at least, so that something comes back."""
    names = [f"p{i}" for i in range(draw(st.integers(least, most)))]
    density = draw(st.sampled_from([0.3, 0.5, 0.8]))
    reads = {name: tuple(other for other in names if other != name and draw(st.floats(0, 1)) < density) for name in names}
    return Hierarchy(reads, draw(st.integers(0, 2**20)), size=draw(st.integers(1, 2)))


FIGURE = {"p1": ("p4",), "p2": ("p3",), "p3": ("p1", "p4"), "p4": ("p3",)}
"""Betty's figure 1: θ4 reaches θ3* directly and through θ1*."""

CHAIN = {"p1": ("p2",), "p2": ("p1", "p3"), "p3": ("p2",)}
DIAMOND = {"p1": ("p4",), "p2": ("p1",), "p3": ("p1",), "p4": ("p2", "p3")}
ROUND = {"p3": ("p0",), "p2": ("p3",), "p1": ("p2",), "p0": ("p1",)}
"""C_0 reads 1, C_1 reads 2, C_2 reads 3, C_3 reads 0: each cost is read only through a chain of levels."""
ROUND_FROM_BELOW = {"p0": ("p1",), "p1": ("p2",), "p2": ("p3",), "p3": ("p0",)}
NAMED = {"figure": FIGURE, "chain": CHAIN, "diamond": DIAMOND, "round": ROUND, "round from below": ROUND_FROM_BELOW}
