"""The table over seeds, with its footnotes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paper_repro.domains.baselines import MEANING
from paper_repro.domains.paired import paired
from paper_repro.domains.taylor import order
from paper_repro.results import spread, table


def summary(outcomes: Sequence[Any]) -> str:
    """Write the table.

    Args:
        outcomes: baselines and methods on all seeds, seed by seed.

    Returns:
        Lines without a newline at the end.
    """
    names = list(dict.fromkeys(o.method for o in outcomes))
    accuracy = {name: [o.accuracy for o in outcomes if o.method == name] for name in names}
    both = {name: [o.both for o in outcomes if o.method == name] for name in names}
    rows = []
    for name in names:
        mine = [o for o in outcomes if o.method == name]
        cells = [name]
        for values in (accuracy, both):
            against = paired(values[name], values["uniform"])
            wins = f"{against.wins} of {against.seeds}"
            cells += [spread(values[name], ".3f"), *(["–", "–"] if name == "uniform" else [str(against), wins])]
        orders = [order(found) for o in mine for found in o.remainders.values()]
        cells += [f"{min(orders):.2f} to {max(orders):.2f}" if orders else "–", spread([o.seconds for o in mine], ".1f")]
        rows.append(cells)
    header = ("weights", "accuracy", "− uniform", "wins", "with valid.", "− uniform", "wins", "Taylor order", "seconds")
    seeds = len({o.seed for o in outcomes})
    notes = [
        *(f"{name}: {what}." for name, what in MEANING.items()),
        "cg, itd, finite-difference: learned by the third level, one for each source; the estimator of both lower levels.",
        "cg-per-example: learned one for each source example, without being told the styles.",
        "accuracy: on the target's test examples. with valid.: the same after finetuning on the validation examples too.",
        "− uniform: the paired difference, mean ± its standard error over seeds.",
        "Taylor order: of the third level's remainder, over seeds and the first, the middle and the last state.",
        f"{seeds} seed{'s: accuracies and seconds are mean ± standard deviation' if seeds > 1 else ''}.",
    ]
    unsolved = sorted({o.method for o in outcomes if o.converged is False})
    notes += [f"NOT SOLVED: a linear system of {name} did not converge." for name in unsolved]
    return table(header, rows) + "\n\n" + "\n".join(notes)
