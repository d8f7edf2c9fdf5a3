"""The dataflow graph of a program: its edges, and the paths of Betty's eq. 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from funcmlo import drawing
from funcmlo.describe import compact, describe
from funcmlo.errors import DefinitionError, listing, suggest
from funcmlo.exactness import Edge, Exactness, closure, exactness
from funcmlo.hypergrad.base import BestResponse
from funcmlo.level import Level


@dataclass(frozen=True)
class Graph:
    """Who reads whom, as a picture in Jupyter (`svg()`), in a terminal (`str`) and for papers (`dot()`, `mermaid()`).

    Cycles cannot arise: l2u edges lead from lower to higher levels, and a path has one u2l edge, its first.

    Attributes:
        levels: the level names, lowest first.
        u2l: (upper, lower) pairs: the lower level reads the upper one's parameters (red).
        l2u: (lower, upper) pairs: the upper level reads the lower one's solution (green).
        notes: lines for each level's box: its optimizer, steps and response.

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
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

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
                else:
                    l2u.append((source, level.name))
        lower = {low for _, low in u2l} | {low for low, _ in l2u}
        return cls(tuple(names), tuple(u2l), tuple(l2u), {level.name: _notes(level, lower) for level in levels})

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
        below = set(self.levels[: self.levels.index(k)])
        reached = closure({lower for upper, lower in self.u2l if upper == k}, self.l2u, below)
        downward = [(upper, lower) for lower, upper in self.l2u]
        return frozenset(reached & closure({lower for lower, upper in self.l2u if upper == k}, downward, below))

    def exact(self, k: str) -> Exactness:
        """Tell whether eq. 2's products are the total derivative of level k, or which edges spoil it.

        Args:
            k: a level name.

        Returns:
            A value that is true exactly if they are, with the spoiling u2l edges in `edges`.

        Raises:
            DefinitionError: there is no such level.

        Example:
            The best response of z answers y, which also moves x under it:

            >>> chain = Graph(("x", "y", "z"), u2l=(("y", "x"), ("z", "y")), l2u=(("x", "y"), ("y", "z"), ("x", "z")))
            >>> bool(chain.exact("y")), chain.exact("z").edges
            (True, (('y', 'x'),))
        """
        self.check(k)
        return exactness(self.levels, self.u2l, self.l2u, k)

    def __post_init__(self) -> None:
        """Refuse edges that lead nowhere or the wrong way."""
        order = {name: i for i, name in enumerate(self.levels)}
        for lower, upper in [*self.l2u, *((low, up) for up, low in self.u2l)]:
            if lower not in order or upper not in order or order[lower] >= order[upper]:
                raise DefinitionError(
                    f"an edge between '{lower}' (lower) and '{upper}' (upper) does not fit the levels "
                    f"{listing(self.levels)}, lowest first; u2l edges are (upper, lower), l2u edges (lower, upper)."
                )

    def below(self, k: str) -> tuple[str, ...]:
        """Return the lower levels that level k reads or is read by, lowest first."""
        self.check(k)
        linked = {lower for upper, lower in self.u2l if upper == k} | {lower for lower, upper in self.l2u if upper == k}
        return tuple(name for name in self.levels if name in linked)

    @property
    def tops(self) -> tuple[str, ...]:
        """The levels that no higher level reads or is read by."""
        lower = {low for _, low in self.u2l} | {low for low, _ in self.l2u}
        return tuple(name for name in self.levels if name not in lower)

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
        return drawing.text(self.levels, self.u2l, self.l2u, self.notes)

    def svg(self) -> str:
        """Draw the graph as an SVG picture, the highest level on top."""
        return drawing.svg(self.levels, self.u2l, self.l2u, self.notes)

    def dot(self) -> str:
        """Write the graph in Graphviz's language."""
        return drawing.dot(self.levels, self.u2l, self.l2u, self.notes)

    def mermaid(self) -> str:
        """Write the graph as a Mermaid flowchart."""
        return drawing.mermaid(self.levels, self.u2l, self.l2u, self.notes)

    def _repr_html_(self) -> str:
        return self.svg()


def _notes(level: Level, lower: set[str]) -> tuple[str, ...]:
    """What a level's box says: optimizer, steps, and its response if a level above may ask for it."""
    steps = f"{level.steps} step{'' if level.steps == 1 else 's'}" + (
        f" after {level.warmup} to warm up" if level.warmup else ""
    )
    if level.name not in lower:
        return describe(level.optimizer), steps
    if isinstance(level.response, BestResponse):
        responses: tuple[str, ...] = (compact(level.response),)
    else:
        responses = tuple(f"{upper}: {compact(response)}" for upper, response in level.response.items())
    return (describe(level.optimizer), steps, *responses)
