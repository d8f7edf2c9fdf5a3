"""Tables of texts: for a terminal, and as HTML that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_GAP = 2


@dataclass(frozen=True)
class Column:
    """A column's head.

    Attributes:
        title: what stands above it.
        hint: what it means, a tooltip in HTML.
        left: whether its cells are flush left.
    """

    title: str
    hint: str = ""
    left: bool = False


def text(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, width: int = 120) -> str:
    """Write a table for a terminal; the first column gives way where the width does not suffice.

    Args:
        columns: the heads.
        rows: the cells, row by row.
        width: of a line, in characters.

    Returns:
        The lines.

    Example:
        >>> print(text([Column("name", left=True), Column("error")], [["CG(20)", "1e-3"], ["ITD()", "0.2"]]))
        name    error
        ------  -----
        CG(20)   1e-3
        ITD()     0.2
    """
    wide = [max(len(column.title), *(len(row[i]) for row in rows), 0) for i, column in enumerate(columns)]
    if wide:
        wide[0] = min(wide[0], max(width - sum(wide[1:]) - _GAP * (len(wide) - 1), 12))

    def line(cells: Sequence[str]) -> str:
        placed = (
            shortened(cell, w).ljust(w) if column.left else cell.rjust(w)
            for cell, w, column in zip(cells, wide, columns, strict=True)
        )
        return (" " * _GAP).join(placed).rstrip()

    rule = (" " * _GAP).join("-" * w for w in wide)
    return "\n".join([line([column.title for column in columns]), rule, *map(line, rows)])


def html(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, caption: str = "", remarks: Sequence[str] = ()) -> str:
    """Write a table as HTML that reads on a light and on a dark ground: it has no colours of its own.

    Args:
        columns: the heads.
        rows: the cells, row by row.
        caption: what stands above the table.
        remarks: sentences below it, a paragraph each.

    Returns:
        The source, without ids, classes or anything from outside.

    Example:
        >>> html([Column("x < y")], [["1"]]).count("<td"), "x &lt; y" in html([Column("x < y")], [["1"]])
        (1, True)
    """
    rule = "border-bottom:1px solid rgba(128,128,128,0.45)"
    cell = "padding:3px 10px;background:transparent;color:inherit;vertical-align:top;font-variant-numeric:tabular-nums"

    def align(column: Column) -> str:
        return "left" if column.left else "right"

    head = "".join(
        f'<th title="{escape(c.hint)}" style="{cell};{rule};text-align:{align(c)};font-weight:600">{escape(c.title)}</th>'
        for c in columns
    )
    body = "".join(
        '<tr style="background:transparent">'
        + "".join(
            f'<td style="{cell};text-align:{align(c)};white-space:{"normal" if c.left else "nowrap"}">{escape(x)}</td>'
            for c, x in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    below = "".join(
        f'<p style="margin:4px 10px;max-width:75em;color:inherit;font-size:90%">{escape(remark)}</p>' for remark in remarks
    )
    above = f'<p style="margin:4px 10px;color:inherit;font-weight:600">{escape(caption)}</p>' if caption else ""
    return (
        f'<div style="overflow-x:auto;color:inherit">{above}'
        '<table style="border-collapse:collapse;margin:4px 0;color:inherit">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
    )


def shortened(words: str, width: int) -> str:
    """Return a text of at most this many characters, with an ellipsis where something is left out."""
    return words if len(words) <= width else f"{words[: max(width - 1, 0)]}…"


def number(value: float | None) -> str:
    """Write a number in three digits; a dash where there is none.

    Args:
        value: what is written; None for a dash.

    Returns:
        The text.

    Example:
        >>> number(0.012345), number(1.2345e-7), number(0.0), number(None)
        ('0.0123', '1.2e-07', '0', '–')
    """
    if value is None:
        return "–"
    if not value:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def counted(value: int | None) -> str:
    """Write a count; a dash where there is none."""
    return "–" if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """Write a time with its unit.

    Args:
        value: what is written; None for a dash.

    Returns:
        The text.

    Example:
        >>> seconds(0.00123), seconds(4.2e-6), seconds(75.0)
        ('1.23 ms', '4.2 µs', '75 s')
    """
    if value is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def size(value: int | None) -> str:
    """Write a number of bytes with its unit.

    Args:
        value: what is written; None for a dash.

    Returns:
        The text.

    Example:
        >>> size(512), size(2048), size(3 * 1024**3)
        ('512 B', '2 KiB', '3 GiB')
    """
    if value is None:
        return "–"
    for unit, exponent in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if value >= 1024**exponent:
            return f"{value / 1024**exponent:.3g} {unit}"
    return f"{value} B"
