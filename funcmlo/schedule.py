"""The order of one outer step: which inner loops run before which updates.

Before each update of a level, every level directly below it runs one inner loop of its `steps` updates, each of which
asks the same of the levels below that one: a level steps when all levels below it have made their steps. Along paths, a
loop that several levels need before one and the same update runs once. An outer step makes every top level's updates so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from funcmlo.graph import Graph
from funcmlo.level import Level


@dataclass(frozen=True)
class Loop:
    """An inner loop: updates of one level, and the loops that run before them.

    Attributes:
        level: the level's name.
        steps: the number of its updates.
        first: the loops before its first update.
        later: the loops before each of its later updates.
        begins_before: whether the loop's start is settled before the loops of `first` run (else it reads their ends).
    """

    level: str
    steps: int
    first: tuple[Loop, ...] = ()
    later: tuple[Loop, ...] = ()
    begins_before: bool = True

    def order(self) -> Iterator[str]:
        """Go through the updates, by level name."""
        if not self.steps:  # solved where it stands, so that the levels below are solved there
            for loop in self.first:
                yield from loop.order()
        for t in range(self.steps):
            for loop in self.first if t == 0 else self.later:
                yield from loop.order()
            yield self.level

    def levels(self) -> frozenset[str]:
        """Return the levels that run in it, those that are taken as solved where they stand too."""
        seen: dict[int, Loop] = {}  # loops are shared: a ladder's tree has exponentially many branches
        waiting = [self]
        while waiting:
            loop = waiting.pop()
            if id(loop) not in seen:
                seen[id(loop)] = loop
                waiting += (*loop.first, *loop.later)
        return frozenset(loop.level for loop in seen.values())


@dataclass(frozen=True)
class Schedule:
    """The order of one outer step. It prints itself; iterating gives the level of every update in order.

    Warm-up comes before a level's first loop and roll-back after its upper levels' update; both are told beside the level.

    Attributes:
        tops: the top levels' loops, in the order in which they run.
        notes: what else happens, by level.

    Example:
        >>> import torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ..., torchopt.sgd(0.1), steps=2, response=fm.AID(fm.CG(5))),
        ...     fm.Level("x", lambda x, y: ..., torchopt.sgd(0.1)),
        ... )
        >>> program.schedule()
        x: 1 update
          before it: y: 2 updates
        >>> list(program.schedule())
        ['y', 'y', 'x']
    """

    tops: tuple[Loop, ...]
    notes: Mapping[str, str]

    def __iter__(self) -> Iterator[str]:
        """Go through the updates of one outer step, by level name."""
        for loop in self.tops:
            yield from loop.order()

    def before(self, of: str) -> tuple[tuple[Loop | str, ...], Loop]:
        """Return what precedes the first loop of level `of`, and that loop.

        Args:
            of: a level's name.

        Returns:
            Whole loops, and names of levels whose loop begins, in order; and the loop.

        Raises:
            KeyError: no loop is that level's.
        """
        done: list[Loop | str] = []
        for loop in self.tops:
            part, found = _before(loop, of)
            done += part
            if found is not None:
                return tuple(done), found
        raise KeyError(of)

    def __str__(self) -> str:
        """Write the order, the outermost loop first."""
        return "\n".join(line for loop in self.tops for line in self._lines(loop, ""))

    def __repr__(self) -> str:
        """Write the order, as in a notebook."""
        return str(self)

    def _lines(self, loop: Loop, when: str) -> Iterator[str]:
        note = f", {self.notes[loop.level]}" if loop.level in self.notes else ""
        yield f"{when}{loop.level}: {loop.steps} update{'' if loop.steps == 1 else 's'}{note}"
        if loop.steps <= 1 or loop.first == loop.later:
            parts = {f"before {'each' if loop.steps > 1 else 'it'}: ": loop.first}
        else:
            parts = {"before the first: ": loop.first, "before each later one: ": loop.later}
        for head, loops in parts.items():
            for inner in loops:
                yield from ("  " + line for line in self._lines(inner, head))


def schedule(levels: Sequence[Level], graph: Graph, before: Mapping[str, Sequence[str]], *, share: bool) -> Schedule:
    """Work out the order of one outer step.

    Args:
        levels: the levels, lowest first.
        graph: their graph.
        before: for each level, the levels whose loops its updates wait for.
        share: whether a loop that ran since the last update of a level serves it (else it runs again).

    Returns:
        The schedule.
    """
    by_name = {level.name: level for level in levels}
    under: dict[str, frozenset[str]] = {}
    for name in graph.levels:
        under[name] = frozenset(before[name]).union(*(under[lower] for lower in before[name]))

    @cache  # without it a ladder's tree would be built once for each of its paths
    def loop(name: str, fresh: frozenset[str]) -> tuple[Loop, frozenset[str]]:
        level = by_name[name]
        first, ran = loops(name, fresh)
        later, again = loops(name, frozenset())
        reads_below = any(source in before[name] for source in level.start_levels)
        return Loop(name, int(level.steps), first, later, not reads_below), frozenset({name}) | ran | again

    @cache
    def loops(name: str, fresh: frozenset[str]) -> tuple[tuple[Loop, ...], frozenset[str]]:
        found: list[Loop] = []
        ran: frozenset[str] = frozenset()
        for lower in reversed([n for n in graph.levels if n in before[name]]):  # the nearest first: they need the others
            if not (share and lower in fresh | ran):
                one, inside = loop(lower, (fresh | ran) & under[lower])
                found.append(one)
                ran |= inside
        return tuple(found), ran

    tops: list[Loop] = []
    ran: frozenset[str] = frozenset()
    waited_for = {lower for names in before.values() for lower in names}
    for name in (name for name in graph.levels if name not in waited_for):
        one, inside = loop(name, ran & under[name])
        tops.append(one)
        ran |= inside
    notes = {level.name: note for level in levels if (note := _note(level))}
    return Schedule(tuple(tops), notes)


def _note(level: Level) -> str:
    parts = []
    if level.warmup:
        parts.append(f"the first time after {level.warmup} more to warm up")
    if level.roll_back:
        parts.append("rolled back to its start and one update after its upper levels' update")
    return "; ".join(parts)


def _before(loop: Loop, of: str) -> tuple[list[Loop | str], Loop | None]:
    """What of a loop precedes level `of`'s first loop, and that loop if it is in it."""
    if loop.level == of:
        return [], loop
    done: list[Loop | str] = []
    for inner in loop.first:
        part, found = _before(inner, of)
        done += part
        if found is not None:
            return ([loop.level, *done] if loop.begins_before and loop.steps else done), found
    return [loop], None


def whole(loop: Loop, steps: int) -> Loop:
    """Return the loop with another number of updates, all of them later ones (a warm-up, a roll-back)."""
    return replace(loop, steps=steps, first=loop.later)
