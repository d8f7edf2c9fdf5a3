"""What checks found: one outcome a check, and the report of them all."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from funcmlo.errors import EstimatorError


@dataclass(frozen=True)
class Finding:
    """What one check measured.

    Attributes:
        error: how far the answer is from what was expected, in the unit that `message` names.
        allowed: how far it may be.
        message: what was expected and, where it is off, what the answer agrees with instead.
    """

    error: float
    allowed: float
    message: str

    def __bool__(self) -> bool:
        """Whether the error is allowed; one that is not a number is not."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Outcome:
    """What became of one check.

    Attributes:
        name: the check's name, which says what is looked for.
        status: "passed", "failed", or "skipped" where the estimator promises nothing that the check could hold it to.
        error: the measured error; NaN where nothing was measured.
        allowed: the allowed error.
        message: what was expected and what came, or why it was skipped.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    error: float = math.nan
    allowed: float = math.nan
    message: str = ""

    def __str__(self) -> str:
        """Write the line of a report."""
        numbers = "" if math.isnan(self.allowed) else f"error {self.error:.2g}, allowed {self.allowed:.2g}"
        told = "" if self.status == "passed" else self.message
        return f"{self.status:8}{self.name:32}{numbers:36}{told}".rstrip()


@dataclass(frozen=True)
class Report:
    """All outcomes of an estimator's checks.

    Attributes:
        subject: what was checked.
        outcomes: one a check, in their order.
    """

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> dict[str, Outcome]:
        """The failed checks by name."""
        return {outcome.name: outcome for outcome in self.outcomes if outcome.status == "failed"}

    @property
    def skipped(self) -> dict[str, Outcome]:
        """The checks that did not apply, by name."""
        return {outcome.name: outcome for outcome in self.outcomes if outcome.status == "skipped"}

    def __getitem__(self, name: str) -> Outcome:
        """Return an outcome by its check's name.

        Args:
            name: the check's name.

        Returns:
            The outcome.

        Raises:
            KeyError: no check has that name.
        """
        for outcome in self.outcomes:
            if outcome.name == name:
                return outcome
        raise KeyError(f"{name!r} is no check; there are {', '.join(outcome.name for outcome in self.outcomes)}")

    def __iter__(self) -> Iterator[Outcome]:
        """Go through the outcomes."""
        return iter(self.outcomes)

    def raise_on_failure(self) -> None:
        """Raise if a check failed.

        Raises:
            EstimatorError: which checks failed, and how.
        """
        if self.failures:
            raise EstimatorError(str(self))

    def __str__(self) -> str:
        """Write a line for each check that ran, the failed ones first, and why the others did not."""
        lines = [f"  {outcome}" for outcome in self._sorted() if outcome.status != "skipped"]
        why: dict[str, list[str]] = {}
        for outcome in self.skipped.values():
            why.setdefault(outcome.message, []).append(outcome.name)
        lines += [f"  skipped, because {reason}: {', '.join(names)}" for reason, names in why.items()]
        return "\n".join([self._headline(), *lines])

    def __repr__(self) -> str:
        """Say how many checks passed."""
        return f"Report({self._headline()})"

    def _repr_html_(self) -> str:
        """Write a table for a notebook."""
        rows = "".join(
            f"<tr><td>{'✓' if o.status == 'passed' else '✗' if o.status == 'failed' else '·'} {o.status}</td>"
            f'<td style="text-align:left"><code>{html.escape(o.name)}</code></td>'
            f"<td>{'' if math.isnan(o.allowed) else f'{o.error:.2g}'}</td>"
            f"<td>{'' if math.isnan(o.allowed) else f'{o.allowed:.2g}'}</td>"
            f'<td style="text-align:left">{"" if o.status == "passed" else html.escape(o.message)}</td></tr>'
            for o in self._sorted()
        )
        head = "<tr><th></th><th>check</th><th>error</th><th>allowed</th><th></th></tr>"
        return f"<p>{html.escape(self._headline())}</p><table><thead>{head}</thead><tbody>{rows}</tbody></table>"

    def _headline(self) -> str:
        count = {status: sum(o.status == status for o in self.outcomes) for status in ("passed", "failed", "skipped")}
        return (
            f"{self.subject}: {count['passed']} checks passed, {count['failed']} failed, {count['skipped']} not applicable"
        )

    def _sorted(self) -> list[Outcome]:
        order = {"failed": 0, "passed": 1, "skipped": 2}
        return sorted(self.outcomes, key=lambda outcome: order[outcome.status])
