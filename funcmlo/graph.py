"""The dataflow graph of a program: its edges, and the paths of Betty's eq. 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from funcmlo.errors import DefinitionError, listing, suggest
from funcmlo.level import Level

Edge = tuple[str, str]


@dataclass(frozen=True)
class Graph:
    """Who reads whom.

    Attributes:
        levels: the level names, lowest first.
        u2l: (upper, lower) pairs: the lower level reads the upper one's parameters (red).
        l2u: (lower, upper) pairs: the upper level reads the lower one's solution (green).

    Example:
        >>> graph = Graph(("classifier", "weights"), (("weights", "classifier"),), (("classifier", "weights"),))
        >>> graph.paths("weights")
        (('weights', 'classifier'),)

    References:
        Choe et al. 2023 (Betty), arXiv 2207.02849, sec. 3.
    """

    levels: tuple[str, ...]
    u2l: tuple[Edge, ...]
    l2u: tuple[Edge, ...]

    @classmethod
    def of(cls, levels: Sequence[Level]) -> Graph:
        """Read the edges from the levels' losses, `init` functions and optimizers.

        Args:
            levels: the levels, lowest first.

        Returns:
            The graph.

        Raises:
            DefinitionError: a name comes twice, or a level reads a name that is no level.
        """
        names = [level.name for level in levels]
        order = {name: i for i, name in enumerate(names)}
        if len(order) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DefinitionError(f"two levels are called {listing(map(repr, twice))}; names must differ.")
        u2l, l2u = [], []
        for level in levels:
            if level.own_argument in order and level.own_argument != level.name and not level.reads:
                raise DefinitionError(
                    f"level '{level.name}': its loss's first argument is '{level.own_argument}', another level, but the "
                    "first argument is the level's own parameters; reorder the arguments, or say reads={…}."
                )
            for source in level.reads_levels:
                if source not in order:
                    raise DefinitionError(
                        f"level '{level.name}' reads '{source}', which is no level{suggest(source, names)} "
                        f"Levels: {listing(names)}."
                    )
                if order[source] > order[level.name]:
                    u2l.append((source, level.name))
                elif source not in level.loop_levels:
                    l2u.append((source, level.name))
                else:
                    raise DefinitionError(
                        f"level '{level.name}': its init or its optimizer reads '{source}', a level below it; only levels "
                        "above can say where or how an inner loop runs."
                    )
        return cls(tuple(names), tuple(u2l), tuple(l2u))

    def paths(self, k: str) -> tuple[tuple[str, ...], ...]:
        """List the paths of level k's hypergradient: one u2l edge from k, then l2u edges to a level that k's cost reads.

        Args:
            k: a level name.

        Returns:
            Tuples of names that begin with k, in the order of their first and then of their later levels.

        Raises:
            DefinitionError: there is no such level.
        """
        self.check(k)
        order = {name: i for i, name in enumerate(self.levels)}
        ends = {lower for lower, upper in self.l2u if upper == k}
        found: list[tuple[str, ...]] = []

        def walk(path: tuple[str, ...]) -> None:
            if path[-1] in ends:
                found.append(path)
            for upper in sorted(
                (u for lower, u in self.l2u if lower == path[-1] and order[u] < order[k]), key=order.__getitem__
            ):
                walk((*path, upper))

        for first in sorted((lower for upper, lower in self.u2l if upper == k), key=order.__getitem__):
            walk((k, first))
        return tuple(found)

    def responding(self, k: str) -> frozenset[str]:
        """Return the levels that some path of `paths(k)` runs through, without listing the paths: there may be 2ⁿ.

        Args:
            k: a level name.

        Returns:
            The levels whose best response enters level k's hypergradient.

        Raises:
            DefinitionError: there is no such level.
        """
        self.check(k)
        below = self.levels[: self.levels.index(k)]
        reached = {lower for upper, lower in self.u2l if upper == k}
        for name in below:  # an l2u edge leads to a later level
            if name in reached:
                reached |= {upper for lower, upper in self.l2u if lower == name and upper in below}
        leading = {lower for lower, upper in self.l2u if upper == k}
        for name in reversed(below):
            if name in leading:
                leading |= {lower for lower, upper in self.l2u if upper == name}
        return frozenset(reached & leading)

    def check(self, name: str) -> None:
        """Raise unless a level has this name.

        Args:
            name: what the user gave.

        Raises:
            DefinitionError: there is no such level.
        """
        if name not in self.levels:
            raise DefinitionError(
                f"no level is called {name!r}{suggest(str(name), self.levels)} Levels: {listing(self.levels)}."
            )

    def __str__(self) -> str:
        """Draw the graph as text, the highest level first."""
        lines = []
        for name in reversed(self.levels):
            reads = [f"{source} (u2l)" for source, level in self.u2l if level == name]
            reads += [f"{source} (l2u)" for source, level in self.l2u if level == name]
            lines.append(f"{name} <- {listing(reads)}")
        return "\n".join(lines)


def doubts(levels: Sequence[Level], graph: Graph) -> list[str]:
    """Say what a program declares that is legal and yet probably not meant.

    Args:
        levels: the levels, lowest first.
        graph: their graph.

    Returns:
        A sentence for each doubt.
    """
    found = [
        f"no path leads from level '{level.name}' through a level below it back to its cost, so its hypergradient is its "
        f"direct gradient alone. Its graph:\n{graph}"
        for level in levels[1:]
        if not graph.responding(level.name)
    ]
    for level in levels:
        # An optimizer's settings leave a converged solution where it is. So does a start, and is meant to where the
        # loss reads the same level (a proximal term).
        unseen = {name for name in level.start_levels if name not in level.cost_levels} | set(level.optimizer_levels)
        if unseen and level.response.requires == "solution":
            found.append(
                f"level '{level.name}': {type(level.response).__name__} looks at the solution alone, so nothing of a "
                f"hypergradient comes through what its init or its optimizer reads of {listing(sorted(unseen))}; use "
                "ITD(), which follows the inner steps."
            )
    return found
