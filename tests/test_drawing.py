"""The drawings show every level and every edge, and an SVG's edges keep clear of boxes that are not their own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcmlo import drawing

SVG = "{http://www.w3.org/2000/svg}"
RED, GREEN = "#cf222e", "#1a7f37"
Graph = tuple[list[str], list[tuple[str, str]], list[tuple[str, str]], dict[str, list[str]]]
Box = tuple[float, float, float, float]

BETTY: Graph = (
    ["p1", "p2", "p3", "p4"],
    [("p4", "p1"), ("p3", "p2"), ("p4", "p3")],
    [("p1", "p3"), ("p3", "p4")],
    {"p1": ["sgd(lr=0.1)", "10 steps", "AID(CG(20))"], "p4": ["adam(lr=0.001)"]},
)
WRITERS = [drawing.svg, drawing.dot, drawing.mermaid, drawing.text]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    names = [f"level{i}" for i in range(draw(st.integers(1, 8)))]
    pairs = list(combinations(names, 2))
    chosen = st.lists(st.sampled_from(pairs), unique=True) if pairs else st.just([])
    lines = st.lists(st.text("m→(=)", max_size=50), max_size=4)
    notes = draw(st.dictionaries(st.sampled_from(names), lines))
    return names, [(upper, lower) for lower, upper in draw(chosen)], draw(chosen), notes


def boxes(root: ET.Element) -> dict[str, Box]:
    """Left, top, right and bottom of each level's box."""
    found = {}
    for group in root.findall(f"{SVG}g[@data-level]"):
        x, y, width, height = (float(group.find(f"{SVG}rect").get(key)) for key in ("x", "y", "width", "height"))
        found[group.get("data-level")] = (x, y, x + width, y + height)
    return found


def edges(root: ET.Element, kind: str) -> list[tuple[str, str]]:
    return [(g.get("data-from"), g.get("data-to")) for g in root.findall(f"{SVG}g[@data-edge='{kind}']")]


def curve(d: str) -> list[tuple[float, float]]:
    """Points of a path of M, V and C, close to each other."""
    points: list[tuple[float, float]] = []
    for letter, numbers in re.findall(r"([A-Z])([^A-Z]*)", d):
        values = [float(number) for number in numbers.split()]
        if letter == "M":
            points.append((values[0], values[1]))
            continue
        a = points[-1]
        corners = (
            [a, a, (a[0], values[0]), (a[0], values[0])]
            if letter == "V"
            else [a, *zip(values[::2], values[1::2], strict=True)]
        )
        assert len(corners) == 4, d
        for step in range(1, 41):
            t = step / 40
            weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            points.append(tuple(sum(w * c[i] for w, c in zip(weights, corners, strict=True)) for i in (0, 1)))
    return points


def inside(point: tuple[float, float], box: Box, margin: float) -> bool:
    left, top, right, bottom = box
    return left - margin < point[0] < right + margin and top - margin < point[1] < bottom + margin


def test_bettys_figure() -> None:
    root = ET.fromstring(drawing.svg(*BETTY))
    assert root.get("role") == "img"
    assert "p1, p2, p3, p4" in root.findtext(f"{SVG}title")
    at = boxes(root)
    assert at["p4"][3] < at["p3"][1] < at["p3"][3] < at["p1"][1] == at["p2"][1]
    assert [text.text for text in root.findall(f"{SVG}g[@data-level='p1']/{SVG}text")] == ["p1", *BETTY[3]["p1"]]
    assert [text.text for text in root.findall(f"{SVG}text")] == list(drawing._LEGEND.values())


@given(graph=graphs())
def test_every_level_and_edge_is_drawn_once_in_its_colour(graph: Graph) -> None:
    levels, u2l, l2u, _ = graph
    root = ET.fromstring(drawing.svg(*graph))
    assert list(boxes(root)) == levels
    assert sorted(edges(root, "u2l")) == sorted(u2l)
    assert sorted(edges(root, "l2u")) == sorted(l2u)
    for kind, colour in (("u2l", RED), ("l2u", GREEN)):
        for group in root.findall(f"{SVG}g[@data-edge='{kind}']"):
            line, head = group.findall(f"{SVG}path")
            assert (line.get("stroke"), head.get("fill")) == (colour, colour)


@given(graph=graphs())
def test_edges_end_at_their_boxes_and_keep_clear_of_the_others(graph: Graph) -> None:
    root = ET.fromstring(drawing.svg(*graph))
    at = boxes(root)
    ends = []
    for group in root.findall(f"{SVG}g[@data-edge]"):
        line, head = group.findall(f"{SVG}path")
        points = curve(line.get("d"))
        source, target = group.get("data-from"), group.get("data-to")
        tip = tuple(map(float, head.get("d").split()[1:3]))
        down = group.get("data-edge") == "u2l"
        for (x, y), box, side in ((points[0], at[source], 3 if down else 1), (tip, at[target], 1 if down else 3)):
            assert box[0] + 8 < x < box[2] - 8
            assert y == pytest.approx(box[side], abs=0.11)
            ends.append((x, y))
        assert points[-1] == pytest.approx((tip[0], tip[1] + (-9 if down else 9)), abs=0.11)
        for name, box in at.items():
            margin = -0.2 if name in {source, target} else 4.0
            assert not any(inside(point, box, margin) for point in points), f"{source} to {target} runs through {name}"
    assert all(abs(x - u) > 15 or abs(y - v) > 15 for (x, y), (u, v) in combinations(ends, 2))


@given(graph=graphs())
def test_boxes_stand_apart_inside_the_picture_and_hold_their_texts(graph: Graph) -> None:
    root = ET.fromstring(drawing.svg(*graph))
    at = boxes(root)
    for a, b in combinations(at.values(), 2):
        assert a[2] + 10 < b[0] or b[2] + 10 < a[0] or a[3] + 10 < b[1] or b[3] + 10 < a[1]
    left, top, width, height = map(float, root.get("viewBox").split())
    picture = (left, top, left + width, top + height)
    corners = [corner for box in at.values() for corner in (box[:2], box[2:])]
    lines = [point for path in root.findall(f"{SVG}g[@data-edge]/{SVG}path[@stroke]") for point in curve(path.get("d"))]
    assert all(inside(point, picture, -10) for point in corners + lines)
    for group in root.findall(f"{SVG}g[@data-level]"):
        box = at[group.get("data-level")]
        for text in group.findall(f"{SVG}text"):
            reach = len(text.text or "") * float(text.get("font-size")) * 0.605 / 2
            assert inside((float(text.get("x")) - reach, float(text.get("y"))), box, -8)
            assert inside((float(text.get("x")) + reach, float(text.get("y")) - 10), box, -2)
    for text in root.findall(f"{SVG}text"):
        assert inside((float(text.get("x")) + len(text.text) * 11.5 * 0.605, float(text.get("y"))), picture, -8)
        assert float(text.get("y")) > max(box[3] for box in at.values()) + 10


@given(graph=graphs())
def test_a_level_stands_above_those_that_it_exchanges_something_with_and_no_higher(graph: Graph) -> None:
    levels, u2l, l2u, _ = graph
    at = boxes(ET.fromstring(drawing.svg(*graph)))
    tops = sorted({box[1] for box in at.values()}, reverse=True)
    row = {name: tops.index(box[1]) for name, box in at.items()}
    for name in levels:
        below = [row[lower] for lower, upper in [*l2u, *((lower, upper) for upper, lower in u2l)] if upper == name]
        assert row[name] == max(below, default=-1) + 1


def test_both_edges_of_a_pair_run_side_by_side() -> None:
    root = ET.fromstring(drawing.svg(["a", "b", "c"], [("b", "a"), ("c", "b"), ("c", "a")], [("a", "c")], {}))
    up, down = (
        root.find(f"{SVG}g[@data-edge='{kind}'][@data-from='{source}']/{SVG}path").get("d")
        for kind, source in (("l2u", "a"), ("u2l", "c"))
    )
    green = {round(y): x for x, y in curve(up)}
    shared = [(green[round(y)], x) for x, y in curve(down) if round(y) in green]
    assert len(shared) > 10
    assert all(red - left == pytest.approx(16, abs=2) for left, red in shared)


def test_an_even_pair_is_drawn_straight() -> None:
    root = ET.fromstring(drawing.svg(["lower", "a_much_wider_upper_level"], [("a_much_wider_upper_level", "lower")], [], {}))
    points = curve(root.find(f"{SVG}g[@data-edge]/{SVG}path").get("d"))
    assert max(x for x, _ in points) - min(x for x, _ in points) < 0.2


def test_a_level_stands_over_the_middle_of_those_below_it() -> None:
    below = ["left", "middle_with_a_long_name", "right"]
    at = boxes(ET.fromstring(drawing.svg([*below, "top"], [("top", name) for name in below], [], {})))
    middle = sum((at[name][0] + at[name][2]) / 2 for name in below) / 3
    assert (at["top"][0] + at["top"][2]) / 2 == pytest.approx(middle, abs=0.2)


def test_the_long_edges_of_a_ladder_run_outside() -> None:
    # Two levels a rung, each reads both of the rung below.
    levels = [f"{side}{rung}" for rung in range(4) for side in "ab"]
    l2u = [(f"{s}{rung}", f"{t}{rung + 1}") for rung in range(3) for s in "ab" for t in "ab"]
    l2u += [("a3", "top"), ("b3", "top")]
    root = ET.fromstring(drawing.svg([*levels, "top"], [("top", "a0"), ("top", "b0")], l2u, {}))
    at = boxes(root)
    left, right = min(at["a1"][0], at["b1"][0]), max(at["a1"][2], at["b1"][2])
    sides = []
    for group in root.findall(f"{SVG}g[@data-edge='u2l']"):
        beside = [x for x, y in curve(group.find(f"{SVG}path").get("d")) if at["a1"][1] <= y <= at["a1"][3]]
        sides.append((max(beside) < left, min(beside) > right))
    assert sorted(sides) == [(False, True), (True, False)]


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_graph_is_drawn_the_same_and_without_notes_or_levels_too(write: object) -> None:
    assert write(*BETTY) == write(*BETTY)
    assert write(*BETTY) != write(*BETTY[:3], {})
    assert isinstance(write([], [], [], {}), str)
    ET.fromstring(drawing.svg([], [], [], {}))


def test_a_picture_holds_no_ids_and_reaches_for_nothing_outside() -> None:
    source = drawing.svg(*BETTY)
    for element in ET.fromstring(source).iter():
        assert element.tag.removeprefix(SVG) in {"svg", "g", "title", "rect", "path", "text"}
        assert not {"id", "class", "href"} & set(element.attrib)
    assert "url(" not in source


NASTY = 'a<&">\\b\n'


def test_names_and_notes_are_escaped() -> None:
    graph: Graph = (
        [NASTY, "end"],
        [("end", NASTY)],
        [(NASTY, "end")],
        {NASTY: ['x < "y" & z', "a\0\tb"], "end": ["[`#1;`]"]},
    )
    root = ET.fromstring(drawing.svg(*graph))
    group = root.find(f"{SVG}g[@data-level]")
    assert [text.text for text in group.findall(f"{SVG}text")] == ['a<&">\\b', 'x < "y" & z', "a b"]
    assert edges(root, "u2l") == [("end", 'a<&">\\b')]
    source = drawing.dot(*graph)
    assert '"a<&\\">\\\\b\\n" [label="a<&amp;\\">\\\\b\\nx < \\"y\\" &amp; z\\na b"];' in source
    assert '"a<&\\">\\\\b\\n" -> "end"' in source
    flow = drawing.mermaid(*graph)
    assert 'n0["a#60;#38;#34;#62;#92;b<br/>x #60; #34;y#34; #38; z<br/>a b"]' in flow
    assert 'n1["end<br/>[#96;#35;1#59;#96;]"]' in flow


def test_a_long_line_is_shortened_and_shown_in_full_as_a_tooltip() -> None:
    long = "clip_grad_norm(0.3) → sgd(lr=learned, momentum=0.9, nesterov=True)"
    group = ET.fromstring(drawing.svg(["y"], [], [], {"y": [long]})).find(f"{SVG}g[@data-level]")
    assert group.findtext(f"{SVG}title") == f"y\n{long}"
    shown = group.findall(f"{SVG}text")[1].text
    assert shown == long[:39] + "…"


@given(graph=graphs())
def test_graphviz_and_mermaid_hold_each_edge_once_in_its_colour(graph: Graph) -> None:
    levels, u2l, l2u, _ = graph
    source = drawing.dot(*graph)
    arrows = re.findall(r'"(\w+)" -> "(\w+)" \[color="(#\w+)", (dir=back, )?', source)
    assert sorted((b, a) for a, b, colour, back in arrows if colour == RED and back) == sorted(u2l)
    assert sorted((a, b) for a, b, colour, back in arrows if colour == GREEN and not back) == sorted(l2u)
    assert len(arrows) == len(u2l) + len(l2u)
    assert source.count("[label=") == len(levels)

    flow = drawing.mermaid(*graph)
    assert flow.startswith("flowchart BT\n")
    links = re.findall(r"n(\d+) (~~~|-->) n(\d+)", flow)  # linkStyle counts the invisible ones too
    colours = {int(i): colour for i, colour in re.findall(r"linkStyle (\d+) stroke:(#\w+)", flow)}
    drawn = [(levels[int(a)], levels[int(b)], colours.get(i)) for i, (a, _, b) in enumerate(links)]
    assert sorted((a, b) for a, b, colour in drawn if colour == RED) == sorted(u2l)
    assert sorted((a, b) for a, b, colour in drawn if colour == GREEN) == sorted(l2u)
    assert [(a, b) for a, b, colour in drawn if colour is None] == list(pairwise(levels))


@given(graph=graphs())
def test_the_text_says_who_reads_whom(graph: Graph) -> None:
    levels, u2l, l2u, _ = graph
    lines = [line for line in drawing.text(*graph).splitlines() if " <- " in line]
    assert [line.split(" <- ")[0] for line in lines] == levels[::-1]
    for line in lines:
        name, reads = line.split(" <- ")
        expected = [f"{a} (u2l)" for a, b in u2l if b == name] + [f"{a} (l2u)" for a, b in l2u if b == name]
        assert reads == (", ".join(expected) or "none")


def test_notes_follow_in_the_text() -> None:
    assert drawing.text(*BETTY) == (
        "p4 <- p3 (l2u)\n    adam(lr=0.001)\np3 <- p4 (u2l), p1 (l2u)\np2 <- p3 (u2l)\n"
        "p1 <- p4 (u2l)\n    sgd(lr=0.1) · 10 steps · AID(CG(20))"
    )
