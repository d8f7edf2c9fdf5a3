"""`Probe`: what was found out about a loss, and what follows for the estimators."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field

from funcmlo.errors import listing, suggest

_NEEDS: dict[str, str] = {
    "FiniteDifference()": "grad",
    "SAMA()": "grad",
    "Penalty()": "grad",
    "PerturbedSolve(…)": "grad",
    "AID(…, Hessian('finite_difference'))": "grad",
    "ITD()": "grad_of_grad",
    "OneStep()": "grad_of_grad",
    "AID(…, Hessian('kept'))": "grad_of_grad",
    "AID(…, Hessian('forward'))": "jvp_of_grad",
    "ITD(memory='mixed')": "jvp_of_grad",
    "ITD(mode='forward')": "jvp_of_grad",
    "ForwardGradient(…)": "jvp_of_grad",
}
_ALWAYS = ("value", "unchanged", "deterministic", "grad")


@dataclass(frozen=True)
class Outcome:
    """The answer to one question.

    Attributes:
        name: the question.
        ok: True, False, or None where it was not tried.
        operation: the operation at fault, as the user knows it, and torch's kernel in brackets.
        message: what was found; where ok is True, a remark.
        remedy: the way around it.
        number: the relative error of what was compared.
    """

    name: str
    ok: bool | None
    operation: str | None = None
    message: str | None = None
    remedy: str | None = None
    number: float | None = None

    def __bool__(self) -> bool:
        """Whether it works."""
        return self.ok is True

    def lines(self) -> Iterator[str]:
        """Go through what there is to say."""
        if self.operation:
            yield self.operation
        if self.message:
            yield self.message
        if self.remedy:
            yield f"→ {self.remedy}"


@dataclass(frozen=True)
class Probe:
    """What works of a loss. It prints itself as a table; `probe.grad_of_grad` is one answer; `bool(probe)` is `works`.

    Attributes:
        loss: the loss's name.
        outcomes: one answer for each question.
        warnings: what torch or the loss warned of, each once.
    """

    loss: str
    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...] = field(default=())

    def __getattr__(self, name: str) -> Outcome:
        """Return an answer by its question's name."""
        outcomes = {} if name.startswith("__") else {outcome.name: outcome for outcome in self.__dict__.get("outcomes", ())}
        if name not in outcomes:
            raise AttributeError(f"a probe has no '{name}'{suggest(name, outcomes)} Questions: {listing(outcomes)}.")
        found: Outcome = outcomes[name]
        return found

    def __bool__(self) -> bool:
        """Whether nothing fails."""
        return self.works

    @property
    def works(self) -> bool:
        """Whether nothing fails."""
        return not self.failures

    @property
    def failures(self) -> dict[str, Outcome]:
        """The answers that are no, by name."""
        return {outcome.name: outcome for outcome in self.outcomes if outcome.ok is False}

    @property
    def notes(self) -> dict[str, Outcome]:
        """The answers that are yes with a remark, and that the loss computes in its own precision alone, by name."""
        return {o.name: o for o in self.outcomes if o.message and (o.ok or (o.ok is None and o.name == "float64"))}

    @property
    def estimators(self) -> dict[str, bool]:
        """Whether each family of estimators has the derivatives that it takes of this loss."""
        base = all(getattr(self, name).ok is not False for name in _ALWAYS) and bool(self.value)
        return {family: base and bool(getattr(self, need)) for family, need in _NEEDS.items()}

    @property
    def advice(self) -> str:
        """Which estimators can be used with this loss, in a sentence or two."""
        able = [family for family, usable in self.estimators.items() if usable]
        if not able:
            first = next((o.name for o in self.outcomes if o.ok is False), "nothing")
            return f"No estimator can be used with this loss as it is: see {first}."
        unable = [family for family, usable in self.estimators.items() if not usable]
        said = "Every estimator can be used." if not unable else f"Use {listing(able)}; not {listing(unable)}."
        if self.consistent.ok is False:
            said += " All of them take the gradient for the loss's derivative, which it is not: see consistent."
        if not self.func_grad.ok:
            said += " Not inside torch.func.grad or vmap."
        elif any(
            self._answers(f"vmap_{of}").count(False) for of in ("of_grad", "of_hvp", "inputs_of_grad", "inputs_of_hvp")
        ):
            said += " Not all of it inside torch.func.vmap."
        return said

    def _answers(self, name: str) -> list[bool | None]:
        return [outcome.ok for outcome in self.outcomes if outcome.name == name]

    def __str__(self) -> str:
        """Write a table: one line for what works, more for what does not."""
        width = max(len(outcome.name) for outcome in self.outcomes)
        table, said = [self._title], dict[tuple[str, ...], str]()
        for outcome in self.outcomes:
            lines = tuple(outcome.lines())
            again = said.setdefault(lines, outcome.name)
            first, *more = [f"as {again}"] if lines and again != outcome.name else lines or [""]
            table.append(f"  {outcome.name:<{width}}  {_WORDS[outcome.ok]:<5}  {first}".rstrip())
            table += [" " * (width + 11) + line for line in more]
        table += [f"  warning: {text}" for text in self.warnings]
        return "\n".join([*table, self.advice])

    @property
    def _title(self) -> str:
        tried = sum(outcome.ok is not None for outcome in self.outcomes)
        count = len(self.failures)
        return f"{self.loss}: {'all' if not count else tried - count} of {tried} questions answered with yes"

    def _repr_html_(self) -> str:
        """Draw the table for Jupyter."""
        rows = "".join(
            f"<tr><td><code>{o.name}</code></td><td>{_WORDS[o.ok]}</td>"
            f"<td style='text-align:left'>{'<br>'.join(html.escape(line) for line in o.lines())}</td></tr>"
            for o in self.outcomes
        )
        rest = "".join(f"<p>warning: {html.escape(text)}</p>" for text in self.warnings)
        return f"<table><caption>{html.escape(self._title)}</caption>{rows}</table>{rest}<p>{html.escape(self.advice)}</p>"


_WORDS = {True: "ok", False: "FAILS", None: "–"}
