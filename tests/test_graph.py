"""Edges, paths, and the levels that paths run through."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torchopt
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo.graph import Graph
from tests.programs import SGD


def graph(reads: dict[str, list[str]]) -> fm.Graph:
    """A graph from «level: what its cost reads», lowest level first."""
    levels = [
        fm.Level(
            name, lambda own, *others: 0.0, torchopt.sgd(0.1), reads={source: source for source in sources} or {"b": "batch"}
        )
        for name, sources in reads.items()
    ]
    return fm.Graph.of(levels)


def test_the_four_problems_of_bettys_figure() -> None:
    # θ4 reaches θ3* directly, and through θ1*.
    four = graph({"p1": ["p4"], "p2": ["p3"], "p3": ["p1", "p4"], "p4": ["p3"]})
    assert four.u2l == (("p4", "p1"), ("p3", "p2"), ("p4", "p3"))
    assert four.l2u == (("p1", "p3"), ("p3", "p4"))
    assert four.paths("p4") == (("p4", "p1", "p3"), ("p4", "p3"))
    assert four.responding("p4") == {"p1", "p3"}
    assert four.paths("p3") == ()
    assert four.responding("p3") == frozenset()


def test_a_ladder_is_not_walked_path_by_path() -> None:
    # Two levels a rung, each reads both of the rung below: 2^40 paths.
    reads = {"a0": ["top"], "b0": ["top"]}
    for rung in range(1, 40):
        reads |= {f"{side}{rung}": [f"a{rung - 1}", f"b{rung - 1}"] for side in "ab"}
    reads["top"] = ["a39", "b39"]
    assert len(graph(reads).responding("top")) == 80


@st.composite
def reads(draw: st.DrawFn) -> dict[str, list[str]]:
    names = [f"p{i}" for i in range(draw(st.integers(1, 6)))]
    return {
        name: draw(st.lists(st.sampled_from([n for n in names if n != name] or [""]), unique=True, max_size=4))
        if len(names) > 1
        else []
        for name in names
    }


@given(reads=reads())
def test_the_levels_on_paths_are_those_that_the_listed_paths_run_through(reads: dict[str, list[str]]) -> None:
    g = graph(reads)
    order = {name: i for i, name in enumerate(g.levels)}
    for upper, lower in g.u2l:
        assert order[upper] > order[lower]
        assert upper in reads[lower]
    for lower, upper in g.l2u:
        assert order[lower] < order[upper]
        assert lower in reads[upper]
    assert len(g.u2l) + len(g.l2u) == sum(map(len, reads.values()))
    for k in g.levels:
        paths = g.paths(k)
        assert len(set(paths)) == len(paths)
        for path in paths:
            assert path[0] == k
            assert (k, path[1]) in g.u2l
            assert all(edge in g.l2u for edge in pairwise(path[1:]))
            assert (path[-1], k) in g.l2u
            assert all(order[name] < order[k] for name in path[1:])
        assert g.responding(k) == {name for path in paths for name in path[1:]}


@pytest.mark.parametrize("ask", [fm.Graph.paths, fm.Graph.responding])
def test_an_unknown_level_is_named(ask: object) -> None:
    with pytest.raises(fm.DefinitionError, match=r"no level is called 'p3'. Levels: p1, p2"):
        ask(graph({"p1": [], "p2": ["p1"]}), "p3")


def test_a_shared_loss_may_call_its_own_parameters_like_another_level() -> None:
    def shared(y, other):
        return ((y - other) ** 2).sum()

    p = fm.Multilevel(
        fm.Level("y", shared, SGD, reads={"other": "x"}, response=fm.AID(fm.CG(3))),
        fm.Level("x", shared, SGD, reads={"other": "y"}),
    )
    assert p.graph.paths("x") == (("x", "y"),)


def test_the_paths_of_more_levels() -> None:
    #   d reads c; b reads a; c reads a and b; a and b read d; a reads c: levels a, b, c, d from the lowest.
    graph = Graph(
        ("a", "b", "c", "d"),
        u2l=(("d", "a"), ("c", "a"), ("d", "b")),
        l2u=(("a", "b"), ("a", "c"), ("b", "c"), ("b", "d"), ("c", "d")),
    )
    assert graph.paths("d") == (
        ("d", "a", "b"),
        ("d", "a", "b", "c"),
        ("d", "a", "c"),
        ("d", "b"),
        ("d", "b", "c"),
    )
    assert graph.paths("c") == (("c", "a"), ("c", "a", "b"))
    assert graph.paths("b") == ()
