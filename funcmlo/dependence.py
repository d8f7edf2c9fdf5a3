"""What a total cost needs: which solutions below it, and which levels above those follow from."""

from __future__ import annotations

from dataclasses import dataclass

from funcmlo.graph import Graph


@dataclass(frozen=True)
class Dependence:
    """The total cost T_k(θ_k, uppers) of every level, in which the levels below stand at their solutions.

    Attributes:
        needed: for each level k, the lower levels whose solutions T_k is evaluated at, the highest first: a solution
            may follow from those before it.
        parents: for each level, the levels above it that its total cost, and so its solution, is a function of.
    """

    needed: dict[str, tuple[str, ...]]
    parents: dict[str, tuple[str, ...]]

    def users(self, name: str) -> tuple[str, ...]:
        """Return the levels whose total cost is evaluated at a level's solution, lowest first."""
        return tuple(k for k, below in self.needed.items() if name in below)


def dependence(graph: Graph) -> Dependence:
    """Work out, from the lowest level up, what each total cost needs.

    Args:
        graph: the program's graph.

    Returns:
        The needed solutions and the parents of every level.
    """
    order = {name: i for i, name in enumerate(graph.levels)}
    needed: dict[str, tuple[str, ...]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for k in graph.levels:
        found: set[str] = set()
        waiting = [lower for lower, upper in graph.l2u if upper == k]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += [parent for parent in parents[name] if order[parent] < order[k]]
        above = {upper for upper, lower in graph.u2l if lower == k}
        above |= {parent for name in found for parent in parents[name] if order[parent] > order[k]}
        needed[k] = tuple(sorted(found, key=order.__getitem__, reverse=True))
        parents[k] = tuple(sorted(above, key=order.__getitem__))
    return Dependence(needed, parents)
