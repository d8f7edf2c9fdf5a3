"""Where a hierarchy's boxes and edges stand: rows, as Sugiyama, Tagawa and Toda 1981 draw them.

A level stands one row above the highest of the levels below that it exchanges something with. Where an edge passes a row
it has a lane there, as if it were a narrow box, so it never runs through a level. Each row is sorted by the mean places of
its neighbours, and then spread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import fmean

Edge = tuple[str, str]
Links = dict[Edge, list[str]]  # the kinds of the edges between a lower and an upper level
Node = str | tuple[str, str, int]  # a level; or, in a row between two levels, the lane of their edges
Rows = list[list[Node]]  # from the lowest, each from left to right
Chains = dict[Edge, list[Node]]  # a lower level, the lanes on the way up, and an upper level
Near = dict[Node, dict[Node, float]]  # how strongly the nodes of neighbouring rows pull at a node, and it at its place


def rows_of(levels: Sequence[str], links: Links) -> tuple[Rows, Chains, Near]:
    """Put the levels, and the lanes of their edges, into rows in which few edges cross.

    Args:
        levels: the level names, lowest first.
        links: the pairs of levels that exchange something.

    Returns:
        The rows from the lowest, each pair's chain of nodes, and how strongly neighbouring nodes pull at each other.
    """
    rank: dict[str, int] = {}
    for name in levels:
        rank[name] = 1 + max((rank[lower] for lower, upper in links if upper == name), default=-1)
    chains: Chains = {(a, b): [a, *((a, b, row) for row in range(rank[a] + 1, rank[b])), b] for a, b in links}
    rows: Rows = [[name for name in levels if rank[name] == row] for row in range(max(rank.values(), default=-1) + 1)]
    for lane in (node for chain in chains.values() for node in chain if not isinstance(node, str)):
        rows[lane[2]].append(lane)
    near: Near = {node: {node: 0.1} for row in rows for node in row}
    for a, b in (pair for chain in chains.values() for pair in pairwise(chain)):
        near[a][b] = near[b][a] = (8.0, 2.0, 1.0)[isinstance(a, str) + isinstance(b, str)]  # bends within edges look worst

    def crossings(rows: Rows) -> int:
        total = 0
        for lower, upper in pairwise(rows):
            place, seen = {node: i for i, node in enumerate(upper)}, list[int]()  # where edges from further left end
            for ends in ([place[other] for other in near[node] if other in place] for node in lower):
                total += sum(len(seen) - bisect_right(seen, end) for end in ends)
                seen = sorted(seen + ends)
        return total

    orders = [[list(row) for row in rows]]
    for sweep in range(24):
        for fixed, row in pairwise(rows[:: -1 if sweep % 2 else 1]):
            place = {node: float(i) for i, node in enumerate(fixed)}
            mean = {n: fmean([place[m] for m in near[n] if m in place] or [i]) for i, n in enumerate(row)}
            row.sort(key=mean.__getitem__)
        orders.append([list(row) for row in rows])
    return min(orders, key=crossings), chains, near


def places(rows: Rows, near: Near, width: Mapping[Node, float], gap: float) -> dict[Node, float]:
    """Find the centre of each node: the least-squares compromise between its neighbours, some distance apart.

    Args:
        rows: the rows from the lowest.
        near: how strongly nodes pull at each other.
        width: each node's width.
        gap: the least distance between neighbours' sides.

    Returns:
        The centres.
    """
    x = {node: float(i) for row in rows for i, node in enumerate(row)}
    for sweep in range(100):
        for row in rows[:: -1 if sweep % 2 else 1]:
            apart = [(width[a] + width[b]) / 2 + gap for a, b in pairwise(row)]
            weights = [sum(near[node].values()) for node in row]
            wanted = [sum(w * x[m] for m, w in near[n].items()) / weight for n, weight in zip(row, weights, strict=True)]
            x.update(zip(row, spread(wanted, weights, apart), strict=True))
    return x


def spread(wanted: Sequence[float], weights: Sequence[float], apart: Sequence[float]) -> list[float]:
    """Move the wanted places as little as possible until neighbours are `apart`: isotonic regression.

    Args:
        wanted: the places, in order.
        weights: how heavy each is.
        apart: the least distance between each and the next.

    Returns:
        The places.
    """
    offsets = list(accumulate(apart, initial=0.0))
    pools: list[tuple[float, float, int]] = []  # mean, weight and count of places that move together
    for place, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, count = place - offset, 1
        while pools and pools[-1][0] > mean:
            other, heavy, more = pools.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + more
        pools.append((mean, weight, count))
    means = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]
