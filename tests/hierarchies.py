"""The hierarchies that tests name; `funcmlo.testing` has the problems and draws random ones."""

from __future__ import annotations

from funcmlo.testing.hierarchy import Hierarchy
from funcmlo.testing.strategies import hierarchies

__all__ = ["CHAIN", "DIAMOND", "FIGURE", "NAMED", "ROUND", "ROUND_FROM_BELOW", "Hierarchy", "hierarchies"]

FIGURE = {"p1": ("p4",), "p2": ("p3",), "p3": ("p1", "p4"), "p4": ("p3",)}
"""Betty's figure 1: θ4 reaches θ3* directly and through θ1*."""

CHAIN = {"p1": ("p2",), "p2": ("p1", "p3"), "p3": ("p2",)}
DIAMOND = {"p1": ("p4",), "p2": ("p1",), "p3": ("p1",), "p4": ("p2", "p3")}
ROUND = {"p3": ("p0",), "p2": ("p3",), "p1": ("p2",), "p0": ("p1",)}
"""C_0 reads 1, C_1 reads 2, C_2 reads 3, C_3 reads 0: each cost is read only through a chain of levels."""
ROUND_FROM_BELOW = {"p0": ("p1",), "p1": ("p2",), "p2": ("p3",), "p3": ("p0",)}
NAMED = {"figure": FIGURE, "chain": CHAIN, "diamond": DIAMOND, "round": ROUND, "round from below": ROUND_FROM_BELOW}
