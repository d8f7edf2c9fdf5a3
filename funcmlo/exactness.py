"""Where the products along paths are the total derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Edge = tuple[str, str]


@dataclass(frozen=True)
class Exactness:
    """Whether `"paths"` is the total derivative of a level, and what spoils it where it is not.

    It is true exactly if no edge spoils it, so `if graph.exact("weights"):` reads as it should.

    Attributes:
        level: the level k.
        edges: the u2l edges (upper, lower) that lead from D, the lower levels that depend on θ_k, to R, the levels
            whose solution reaches C_k.
    """

    level: str
    edges: tuple[Edge, ...]

    def __bool__(self) -> bool:
        """Say whether the products along paths are the total derivative."""
        return not self.edges

    def __iter__(self) -> Iterator[Edge]:
        """Go through the spoiling edges."""
        return iter(self.edges)

    def __str__(self) -> str:
        """Say it in a sentence."""
        if not self.edges:
            return f"the products along paths are the total derivative of level '{self.level}'"
        listed = ", ".join(f"{upper} -> {lower}" for upper, lower in self.edges)
        return f"the products along paths leave out of level '{self.level}' what goes through the u2l edges {listed}"


def exactness(levels: Sequence[str], u2l: Sequence[Edge], l2u: Sequence[Edge], k: str) -> Exactness:
    """Find the edges that make eq. 2 differ from the total derivative of level k.

    A lower level l ∈ D responds to θ_k by minimizing its *total* cost, in which the solutions below it move with θ_l.
    Eq. 2 takes them to stand still. That is no difference if θ_l does not reach, by u2l edges, a solution that C_k or a
    cost on the way reads.

    Args:
        levels: the level names, lowest first.
        u2l: (upper, lower) pairs.
        l2u: (lower, upper) pairs.
        k: the level.

    Returns:
        The answer, with the edges in the graph's order.
    """
    below = set(levels[: levels.index(k)])
    dependent = closure({lower for upper, lower in u2l if upper == k}, [*u2l, *l2u], below)
    reading = closure({lower for lower, upper in l2u if upper == k}, [(upper, lower) for lower, upper in l2u], below)
    return Exactness(k, tuple(edge for edge in u2l if edge[0] in dependent and edge[1] in reading))


def closure(start: set[str], edges: Sequence[Edge], within: set[str]) -> set[str]:
    """Return what can be reached from some names along edges without leaving a set, themselves included.

    Args:
        start: the first names.
        edges: (from, to) pairs.
        within: the names that may be visited.

    Returns:
        The names reached.
    """
    onward: dict[str, list[str]] = {}
    for origin, to in edges:
        onward.setdefault(origin, []).append(to)
    found = start & within
    frontier = list(found)
    while frontier:
        for name in onward.get(frontier.pop(), ()):
            if name in within and name not in found:
                found.add(name)
                frontier.append(name)
    return found
