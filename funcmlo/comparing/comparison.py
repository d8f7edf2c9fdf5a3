"""`Comparison`: estimators side by side, as a table, a figure, and a choice."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from funcmlo import table
from funcmlo.comparing import error_plot
from funcmlo.comparing.measuring import Inner, Row
from funcmlo.comparing.reference import Reference
from funcmlo.errors import EstimatorError, listing, suggest
from funcmlo.hypergrad.base import BestResponse
from funcmlo.table import Column

Cost = Literal["seconds", "hvps", "gradients", "steps", "memory"]

_WIDTH = 120
_HARDLY = 1e-3  # what is off, or moves, by less is good enough for most uses


@dataclass(frozen=True)
class Comparison:
    """What `fm.compare` found: a row for each estimator, and what they share.

    It prints itself, in Jupyter as HTML; `comparison["CG(20)"]` is a row, iterating gives all of them.

    Attributes:
        rows: one for each estimator, in the order given.
        reference: what they are compared with, and how good that is.
        of: the level whose hypergradient was taken.
        through: the levels whose response was replaced.
        inner: how well each of these is solved where the hypergradient was taken.
        shared_seconds: of a whole call without any estimator: the inner loops, the upper cost and its direct gradient.
        shared_memory: the bytes that such a call has alive at once.
        repeats: how often each estimator was timed.
        device: where it ran.
    """

    rows: tuple[Row, ...]
    reference: Reference
    of: str
    through: tuple[str, ...]
    inner: Mapping[str, Inner]
    shared_seconds: float
    shared_memory: int
    repeats: int
    device: str

    def row(self, name: str) -> Row:
        """Return the row of an estimator.

        Args:
            name: what it is called in the table.

        Returns:
            Its row.

        Raises:
            EstimatorError: there is none of this name.
        """
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise EstimatorError(f"no estimator is called {name!r}{suggest(str(name), names)} There are {listing(names)}.")

    def __getitem__(self, name: str) -> Row:
        """Return the row of an estimator by its name."""
        return self.row(name)

    def __iter__(self) -> Iterator[Row]:
        """Go through the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def best(self, tolerance: float, cost: Cost = "seconds") -> BestResponse:
        """Return the cheapest estimator that is good enough.

        Args:
            tolerance: the largest relative error that is; of a stochastic estimator its root mean square.
            cost: what is to be small: `"seconds"`, `"hvps"`, `"gradients"`, `"steps"` or `"memory"`.

        Returns:
            The estimator, ready for `Level(response=…)`. Of two that cost the same, the more accurate one.

        Raises:
            EstimatorError: none is good enough; the message names the nearest.
        """
        _check_cost(cost)
        known = [row for row in self.rows if row.reason is None and row.error is not None]
        good = [row for row in known if row.error is not None and row.error <= tolerance]
        if not good:
            finite = min(known, key=lambda row: _infinite_if_none(row.error), default=None)
            nearest = "none has an answer" if finite is None else f"the nearest is {finite.name}, {finite.error:.2g} off"
            raise EstimatorError(
                f"no estimator is within {tolerance:g} of the reference: {nearest}. Raise the tolerance, or compare more "
                "accurate ones."
            )
        chosen = min(good, key=lambda row: (_infinite_if_none(getattr(row, cost)), _infinite_if_none(row.error)))
        return chosen.estimator

    def remarks(self) -> tuple[str, ...]:
        """Say in sentences what is to be known for reading the table."""
        reference = self.reference
        own = "is not known" if reference.error is None else f"is about {table.number(reference.error)}"
        said = [f"The reference is {reference.description}; its own relative error {own}."]
        errors = [row.error for row in self.rows if row.error is not None]
        if reference.error is not None and errors and reference.error > max(min(errors), _HARDLY):
            said.append("That is more than the least error in the table: errors of its size do not tell estimators apart.")
        for name, inner in self.inner.items():
            began = "" if inner.relative is None else f", {table.number(inner.relative)} of its value at the loop's start"
            said.append(f"Level '{name}': ‖∇g‖ at the inner solution is {table.number(inner.stationarity)}{began}.")
        said += _unsolved(self.rows, reference)
        said.append(
            f"Seconds are what an estimator adds to the {table.seconds(self.shared_seconds)} that all share (the inner "
            f"loops and the upper cost), the median of {self.repeats} interleaved runs on {self.device}. Memory is "
            f"the peak of the whole call; {table.size(self.shared_memory)} without any estimator."
        )
        if any(row.bias is not None for row in self.rows):
            said.append(
                "Of a stochastic estimator the error is the root mean square of one draw; bias ± its standard error is that "
                "of the mean of all draws, and an unbiased estimator's is about as large as its standard error."
            )
        return (*said, *reference.remarks)

    def __str__(self) -> str:
        """Write the table and what is to be known, for a terminal."""
        columns, rows = self._cells()
        said = [f"[{i}] {note}" for i, note in enumerate(self._notes().values(), 1)] + list(self.remarks())
        lines = [textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for text in said]
        return "\n".join([self._caption(), "", table.text(columns, rows, width=_WIDTH), "", *lines])

    def __repr__(self) -> str:
        """Write the table, as in a notebook without HTML."""
        return str(self)

    def _repr_html_(self) -> str:
        columns, rows = self._cells()
        said = [f"[{i}] {note}" for i, note in enumerate(self._notes().values(), 1)] + list(self.remarks())
        return table.html(columns, rows, caption=self._caption(), remarks=said)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas data frame, indexed by name.

        Returns:
            The frame; gradients are left out.

        Raises:
            EstimatorError: pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError:
            raise EstimatorError("to_pandas needs pandas, which is not installed: pip install pandas.") from None
        names = [f.name for f in fields(Row) if f.name != "gradient"]
        return pandas.DataFrame([{name: getattr(row, name) for name in names} for row in self.rows]).set_index("name")

    def plot(self, cost: Cost = "seconds", *, axes: Any = None) -> Any:
        """Draw the error against a cost, both on logarithmic scales.

        Args:
            cost: `"seconds"`, `"hvps"`, `"gradients"`, `"steps"` or `"memory"`.
            axes: matplotlib's axes to draw in; None for a new figure.

        Returns:
            The axes.

        Raises:
            EstimatorError: matplotlib is not installed, there is no such cost, or nothing to draw.
        """
        _check_cost(cost)
        return error_plot.draw(self.rows, self.reference, cost, axes)

    def _caption(self) -> str:
        return f"Hypergradient of level '{self.of}' through {listing(repr(name) for name in self.through)}"

    def _notes(self) -> dict[str, str]:
        """What is said of single rows, by the row's name."""
        said = {row.name: [*([f"failed: {row.reason}"] if row.reason else []), *row.notes] for row in self.rows}
        return {name: f"{name}: {'; '.join(notes)}" for name, notes in said.items() if notes}

    def _cells(self) -> tuple[list[Column], list[list[str]]]:
        """The columns in which there is something, and their cells."""
        marks = {name: f" [{i}]" for i, name in enumerate(self._notes(), 1)}
        shown = [
            (column, [write(row) for row in self.rows])
            for column, write in _COLUMNS
            if column.title in _ALWAYS or any(write(row) not in ("–", "0") for row in self.rows)
        ]
        room = _WIDTH - sum(2 + max(len(column.title), *map(len, cells)) for column, cells in shown)
        names = []
        for row in self.rows:
            mark = marks.get(row.name, "")
            names.append(table.shortened(row.name, max(room, 12) - len(mark)) + mark)
        shown.insert(0, (Column("estimator", left=True), names))
        return [column for column, _ in shown], [list(cells) for cells in zip(*(cells for _, cells in shown), strict=True)]


def _unsolved(rows: tuple[Row, ...], reference: Reference) -> list[str]:
    """Say that the inner problem is not solved, where that is as large as what is compared."""
    errors = [row.error for row in rows if row.error is not None]
    if reference.moves is None:
        return []
    told = f"With as many inner steps again the reference moves by {table.number(reference.moves)} (relative)"
    if not errors or reference.moves <= max(min(errors), 10 * (reference.error or 0.0)):
        return [f"{told}."]
    if reference.moves < _HARDLY:
        return [f"{told}: smaller errors do not tell how near an answer is to the solution's hypergradient."]
    return [
        f"The inner problem is not solved. {told}, more than the least error in the table. A smaller error says how well an "
        "estimator reaches the reference at this unsolved point, not how near it is to the solution's hypergradient. The "
        "implicit derivative (AID) and that of the run (ITD) agree at a solution only: here their difference is no error of "
        "either. Make more inner steps; or compare with reference='unrolled' if it is the run that is to be differentiated."
    ]


def _check_cost(cost: Any) -> None:
    if cost not in get_args(Cost):
        raise EstimatorError(f"cost={cost!r}; expected {listing(map(repr, get_args(Cost)))}.")


def _infinite_if_none(value: float | None) -> float:
    return float("inf") if value is None else float(value)


def _bias(row: Row) -> str:
    if row.bias is None or row.bias_error is None:
        return "–"
    return f"{table.number(row.bias)} ± {table.number(row.bias_error)}"


def _made(row: Row) -> str:
    return table.counted(None if row.steps is None else row.steps + (row.replayed or 0))


_COLUMNS = (
    (Column("error", "‖a − r‖ / ‖r‖; of a stochastic estimator the root mean square"), lambda r: table.number(r.error)),
    (Column("cosine", "of the angle with the reference"), lambda r: "–" if r.cosine is None else f"{r.cosine:.4f}"),
    (Column("bias", "of the mean over draws, ± its standard error"), _bias),
    (Column("seconds", "what it adds to the inner loops"), lambda r: table.seconds(r.seconds)),
    (Column("HVPs", "Hessian-vector products"), lambda r: table.counted(r.hvps)),
    (Column("grads", "gradients of the lower cost"), lambda r: table.counted(r.gradients)),
    (Column("steps", "inner steps differentiated or made again"), _made),
    (Column("iter.", "of the linear solver"), lambda r: table.counted(r.iterations)),
    (Column("residual", "of the linear system"), lambda r: table.number(r.residual)),
    (Column("memory", "the peak of the whole call"), lambda r: table.size(r.memory)),
)
_ALWAYS = ("error", "cosine", "seconds", "memory")
