"""What `program.memory` returns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from funcmlo import table
from funcmlo.errors import DefinitionError, suggest
from funcmlo.hypergrad.base import BestResponse

_COLUMNS = (
    table.Column("response", left=True),
    table.Column("peak", "predicted for the level's own inner steps"),
    table.Column("copies", "the peak divided by the bytes of the lower levels' parameters"),
    table.Column("grows as", "with the inner steps T", left=True),
    table.Column("measured", "at how many inner steps", left=True),
)


@dataclass(frozen=True)
class Footprint:
    """A response and the memory that it is going to take.

    Attributes:
        name: what it is called.
        response: the estimator.
        peak: the predicted bytes of tensors alive at once, beyond those before the call; None where it does not run.
        law: how the peak grows with the inner steps.
        measured: the bytes that were measured, by the inner steps of the levels that were differentiated through.
        reason: why there is no number.
    """

    name: str
    response: BestResponse
    peak: int | None
    law: str
    measured: dict[tuple[int, ...], int]
    reason: str | None = None


@dataclass(frozen=True)
class MemoryReport:
    """The peak memory of a level's hypergradient with each of some responses: a table that prints itself.

    Attributes:
        rows: the responses.
        of: the level whose hypergradient it is.
        steps: the inner steps of the levels that it is differentiated through.
        parameters: the bytes of their parameters.
    """

    rows: tuple[Footprint, ...]
    of: str
    steps: dict[str, int]
    parameters: int

    def __getitem__(self, name: str) -> Footprint:
        """Return the row of a name.

        Args:
            name: what the response is called in the table.

        Returns:
            The row.

        Raises:
            DefinitionError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise DefinitionError(f"the report has no {name!r}{suggest(name, names)}")

    def __iter__(self) -> Iterator[Footprint]:
        """Go through the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def least(self) -> Footprint:
        """Return the row with the least memory.

        Returns:
            The row.

        Raises:
            DefinitionError: nothing ran.
        """
        known = [row for row in self.rows if row.peak is not None]
        if not known:
            raise DefinitionError(f"no response ran: {'; '.join(f'{row.name}: {row.reason}' for row in self.rows)}.")
        return min(known, key=lambda row: row.peak or 0)

    def remarks(self) -> tuple[str, ...]:
        """Say in sentences what the numbers mean."""
        failed = [f"{row.name} did not run: {row.reason}." for row in self.rows if row.reason]
        several = "Of several levels below one another each is measured alone, which may tell too little."
        return (
            f"Peaks are bytes of tensors alive at once, beyond those before the call; the parameters take "
            f"{table.size(self.parameters)}. What an operation takes inside and gives back, and what an allocator keeps, "
            "come on top.",
            *([several] if len(self.steps) > 1 else []),
            *failed,
        )

    def _caption(self) -> str:
        steps = ", ".join(f"{n:,} of '{name}'" for name, n in self.steps.items())
        return f"Memory of the hypergradient of '{self.of}' through the inner steps: {steps}"

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                "–" if row.peak is None else table.size(row.peak),
                "–" if row.peak is None else f"{row.peak / max(self.parameters, 1):.1f}",
                row.law,
                "T = " + ", ".join("+".join(map(str, steps)) for steps in row.measured) if row.measured else "–",
            ]
            for row in self.rows
        ]

    def __str__(self) -> str:
        """Write the table, for a terminal."""
        lines = [textwrap.fill(said, 120, subsequent_indent="  ") for said in self.remarks()]
        return "\n".join([self._caption(), "", table.text(_COLUMNS, self._cells()), "", *lines])

    def __repr__(self) -> str:
        """Write the table, as in a notebook without HTML."""
        return str(self)

    def _repr_html_(self) -> str:
        return table.html(_COLUMNS, self._cells(), caption=self._caption(), remarks=self.remarks())
