"""Drawings of a dataflow graph: SVG for notebooks, Graphviz and Mermaid source, text for a terminal."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from funcmlo.errors import listing
from funcmlo.layout import Chains, Edge, Links, Node, places, rows_of, spread

Notes = Mapping[str, Sequence[str]]

_COLOURS = {"l2u": "#1a7f37", "u2l": "#cf222e"}
_LEGEND = {"l2u": "↑ l2u: solution, read from below", "u2l": "↓ u2l: parameters, read from above"}
_FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_LONGEST, _GLYPH = 40, 0.61  # characters of a line in a box, and the width of one in its font size
_NAME, _NOTE = 14.0, 11.5  # font sizes, in pixels like all lengths here
_PAD, _LINE, _MARGIN = 12.0, 17.0, 20.0  # inside a box; the height of a line; around the drawing
_GAP, _PORT, _HEAD = 24.0, 16.0, 9.0  # between boxes; between the ends of two edges; the length of an arrow's head


def svg(levels: Sequence[str], u2l: Sequence[Edge], l2u: Sequence[Edge], notes: Notes) -> str:
    """Draw the graph as a self-contained SVG picture, the highest level on top.

    Args:
        levels: the level names, lowest first.
        u2l: (upper, lower) pairs: the lower level reads the upper one's parameters (red, downwards).
        l2u: (lower, upper) pairs: the upper level reads the lower one's solution (green, upwards).
        notes: by level name, short lines for its box; a level may be missing.

    Returns:
        The SVG source, the same at every call. It holds no ids, which would clash with another drawing's on a page.

    Example:
        >>> picture = svg(["classifier", "weights"], [("weights", "classifier")], [], {"classifier": ["sgd(lr=0.1)"]})
        >>> picture.count("data-level"), picture.count('data-edge="u2l"'), picture.count('data-edge="l2u"')
        (2, 1, 0)
    """
    lines, links = _lines(levels, notes), _links(u2l, l2u)
    rows, chains, near = rows_of(levels, links)
    rank = {node: i for i, row in enumerate(rows) for node in row}
    width = {node: _width(node, lines, links) for node in rank}
    x = places(rows, near, width, _GAP)
    tracks = _tracks(links, chains, x, width)
    spans, y = [], 0.0  # each row's bottom and top; a picture's y points downwards
    for row in rows:
        high = 2 * _PAD + _LINE * max(len(lines[node]) for node in row if isinstance(node, str))
        spans.append((y, y - high))
        far = max((abs(x[a] - x[b]) for chain in chains.values() for a, b in pairwise(chain) if a in row), default=0.0)
        y -= high + 60 + min(0.12 * far, 60)  # more room where edges run far to the side
    drawn = [_edge(lines[a][0], lines[b][0], kind, track, spans[rank[a] :]) for ((a, b), kind), track in tracks.items()]
    drawn += [_box(lines[name], x[name], width[name], *spans[rank[name]]) for name in levels]
    kinds = sorted({kind for _, kind in tracks})
    left = min((x[node] - width[node] / 2 for node in rank), default=0.0)
    right = max((x[node] + width[node] / 2 for node in rank), default=0.0)
    wide = max(right - left, *(_extent(_LEGEND[kind], _NOTE) for kind in kinds), 0.0) + 2 * _MARGIN
    left, top = (left + right - wide) / 2, min((high for _, high in spans), default=0.0) - _MARGIN
    high = _MARGIN + (len(kinds) * _LINE + _PAD if kinds else 0.0) - top
    for i, kind in enumerate(kinds):
        drawn.append(_text(_LEGEND[kind], left + _MARGIN, _MARGIN + i * _LINE + 10, f'fill="{_COLOURS[kind]}"'))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="{left:.1f} {top:.1f} {wide:.1f} {high:.1f}" style="max-width:100%;height:auto" font-family="{_FONT}">',
        f"<title>The levels {escape(listing(name for name, *_ in lines.values()))}, and what they read</title>",
        # A light ground of its own, because a notebook may be dark.
        _rectangle(left + 0.5, top + 0.5, wide - 1, high - 1, 'fill="#ffffff" stroke="#d0d7de"'),
        *drawn,
        "</svg>",
    ])


def dot(levels: Sequence[str], u2l: Sequence[Edge], l2u: Sequence[Edge], notes: Notes) -> str:
    """Write the graph as Graphviz source, from the arguments that `svg` takes.

    Returns:
        The source of a digraph, the highest level on top.

    Example:
        >>> print(dot(["y", "x"], [("x", "y")], [], {"y": ["sgd(lr=0.1)"]}).splitlines()[-2])
            "y" -> "x" [color="#cf222e", dir=back, tooltip="u2l"];
    """
    # JSON's strings are quoted as Graphviz's; besides, Graphviz reads entities in a label.
    names = {name: json.dumps(name, ensure_ascii=False) for name in levels}
    source = ["rankdir=BT;", 'node [shape=box, style="rounded,filled", fillcolor="#f6f8fa", color="#8c959f"];']
    for name, texts in _lines(levels, notes).items():
        source.append(f"{names[name]} [label={json.dumps(chr(10).join(texts).replace('&', '&amp;'), ensure_ascii=False)}];")
    # Each edge points upwards for the ranks' sake; a u2l edge has its arrow at its tail.
    for (lower, upper), kinds in _links(u2l, l2u).items():
        for kind in kinds:
            back = "dir=back, " if kind == "u2l" else ""
            source.append(f'{names[lower]} -> {names[upper]} [color="{_COLOURS[kind]}", {back}tooltip="{kind}"];')
    return "\n    ".join(["digraph levels {", *source]) + "\n}"


def mermaid(levels: Sequence[str], u2l: Sequence[Edge], l2u: Sequence[Edge], notes: Notes) -> str:
    """Write the graph as the source of a Mermaid flowchart, from the arguments that `svg` takes.

    Returns:
        The source of a flowchart, the highest level on top.

    Example:
        >>> print(mermaid(["y", "x"], [("x", "y")], [], {"y": ["sgd(lr=0.1)"]}))
        flowchart BT
            n0["y<br/>sgd(lr=0.1)"]
            n1["x"]
            n0 ~~~ n1
            n1 --> n0
            linkStyle 1 stroke:#cf222e
    """
    ids = {name: f"n{i}" for i, name in enumerate(levels)}  # a name such as `end` is a keyword
    source = []
    for name, texts in _lines(levels, notes).items():
        safe = ("".join(f"#{ord(c)};" if c in '"#&<>`;\\' else c for c in text) for text in texts)
        source.append(f'{ids[name]}["{"<br/>".join(safe)}"]')
    # Invisible links keep each level above those before it: an edge downwards alone would turn two levels around.
    source += [f"{ids[lower]} ~~~ {ids[upper]}" for lower, upper in pairwise(levels)]
    edges = [(edge, kind) for kind, pairs in (("u2l", u2l), ("l2u", l2u)) for edge in pairs]
    source += [f"{ids[first]} --> {ids[last]}" for (first, last), _ in edges]
    source += [f"linkStyle {i} stroke:{_COLOURS[kind]}" for i, (_, kind) in enumerate(edges, max(len(levels) - 1, 0))]
    return "\n    ".join(["flowchart BT", *source])


def text(levels: Sequence[str], u2l: Sequence[Edge], l2u: Sequence[Edge], notes: Notes) -> str:
    """Write the graph for a terminal, from the arguments that `svg` takes.

    Returns:
        Who reads whom, the highest level first, each with its notes in a line below.

    Example:
        >>> print(text(["y", "x"], [("x", "y")], [("y", "x")], {"y": ["sgd(lr=0.1)", "10 steps"]}))
        x <- y (l2u)
        y <- x (u2l)
            sgd(lr=0.1) · 10 steps
    """
    written = []
    for name, (_, *about) in reversed(_lines(levels, notes).items()):
        reads = [f"{source} (u2l)" for source, level in u2l if level == name]
        reads += [f"{source} (l2u)" for source, level in l2u if level == name]
        written.append(f"{name} <- {listing(reads)}")
        written += [f"    {' · '.join(about)}"] if about else []
    return "\n".join(written)


def _lines(levels: Sequence[str], notes: Notes) -> dict[str, list[str]]:
    """Each level's name and notes, as lines of printable characters."""

    def line(text: str) -> str:
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())

    return {name: [line(name), *map(line, notes.get(name, ()))] for name in levels}


def _links(u2l: Sequence[Edge], l2u: Sequence[Edge]) -> Links:
    links: Links = {edge: ["l2u"] for edge in l2u}
    for upper, lower in u2l:
        links.setdefault((lower, upper), []).append("u2l")
    return links


def _tracks(
    links: Links, chains: Chains, x: Mapping[Node, float], width: Mapping[Node, float]
) -> dict[tuple[Edge, str], list[float]]:
    """Find where each edge is in each row of its chain."""
    tracks = {}
    sides: dict[tuple[Node, int], list[list[float]]] = {}
    for link, kinds in links.items():
        for i, kind in enumerate(kinds):
            tracks[link, kind] = [x[node] + (i - (len(kinds) - 1) / 2) * _PORT for node in chains[link]]
            for end in (0, -1):
                sides.setdefault((chains[link][end], end), []).append(tracks[link, kind])
    for (_, end), edges in sides.items():
        edges.sort(key=lambda track: track[-2 if end else 1])
    for _ in range(30):
        for (box, end), edges in sides.items():
            # The ends go half of the way to where the edge comes from, in its order, between heavy walls.
            wanted = [(track[end] + track[-2 if end else 1]) / 2 for track in edges]
            wanted = [x[box] - width[box] / 2, *wanted, x[box] + width[box] / 2]
            apart = [_PAD, *[_PORT] * (len(edges) - 1), _PAD]
            moved = spread(wanted, [1e6, *[1.0] * len(edges), 1e6], apart)
            for track, place in zip(edges, moved[1:-1], strict=True):
                track[end] = place
    return tracks


def _edge(lower: str, upper: str, kind: str, track: Sequence[float], spans: Sequence[tuple[float, float]]) -> str:
    """Draw an edge between the top of its lower level and the bottom of its upper one."""
    down, reader, read = (1, lower, upper) if kind == "u2l" else (-1, upper, lower)
    points = [(x, y) for x, span in zip(track, spans, strict=False) for y in span][1:-1][::-down]
    (x, begin), (tip_x, tip) = points[0], points[-1]
    # Straight at both ends, for the head's sake and for an edge beside it that runs the other way.
    points[0], points[-1] = (x, begin + down * _HEAD), (tip_x, tip - down * _HEAD)
    d = f"M {x:.1f} {begin:.1f} V {points[0][1]:.1f}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        middle = (y0 + y1) / 2  # a curve between two rows, and a line through the next
        d += f" V {y1:.1f}" if i % 2 else f" C {x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}"
    return (
        f'<g data-edge="{kind}" data-from="{escape(read)}" data-to="{escape(reader)}">'
        f"<title>{escape(reader)} reads {escape(read)} ({kind})</title>"
        f'<path d="{d}" fill="none" stroke="{_COLOURS[kind]}" stroke-width="1.8"/>'
        f'<path d="M {tip_x:.1f} {tip:.1f} l -4.5 {-down * _HEAD} h 9 Z" fill="{_COLOURS[kind]}"/></g>'
    )


def _box(lines: Sequence[str], x: float, width: float, bottom: float, top: float) -> str:
    """Draw a level, with its texts in full as a tooltip."""
    y = (top + bottom - len(lines) * _LINE) / 2 + 0.75 * _LINE
    name, *notes = (f"{line[: _LONGEST - 1]}…" if len(line) > _LONGEST else line for line in lines)
    frame = _rectangle(x - width / 2, top, width, bottom - top, 'fill="#f6f8fa" stroke="#8c959f"')
    texts = [_text(name, x, y, 'fill="#1f2328" font-weight="600" text-anchor="middle"', _NAME)]
    texts += [_text(note, x, y + i * _LINE, 'fill="#57606a" text-anchor="middle"') for i, note in enumerate(notes, 1)]
    return f'<g data-level="{escape(lines[0])}"><title>{escape(chr(10).join(lines))}</title>{frame}{"".join(texts)}</g>'


def _rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6" {style}/>'


def _text(words: str, x: float, y: float, style: str, size: float = _NOTE) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {style}>{escape(words)}</text>'


def _extent(words: str, size: float) -> float:
    """The width of a shortened line, in which East Asian characters take two places."""
    return size * _GLYPH * sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in words[:_LONGEST])


def _width(node: Node, lines: Mapping[str, Sequence[str]], links: Links) -> float:
    if not isinstance(node, str):
        return (len(links[node[:2]]) - 1) * _PORT
    ends = max(sum(len(kinds) for link, kinds in links.items() if link[side] == node) for side in (0, 1))
    return 2 * _PAD + max(ends * _PORT, 40.0, *(_extent(line, _NOTE if i else _NAME) for i, line in enumerate(lines[node])))
