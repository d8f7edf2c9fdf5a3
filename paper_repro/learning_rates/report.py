"""The table over seeds, with its footnotes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paper_repro.domains.paired import Paired, paired
from paper_repro.learning_rates.methods import METHODS
from paper_repro.results import spread, table


def reached(learned: Sequence[float], grid: Sequence[float]) -> int:
    """Count the seeds on which a learned run reaches the grid: its validation loss is at most that of the grid's best.

    Args:
        learned: validation losses by seed.
        grid: those of the grid's best rate, on the same seeds.

    Returns:
        The number of seeds, without any tolerance.
    """
    return sum(a <= b for a, b in zip(learned, grid, strict=True))


def summary(outcomes: Sequence[Any]) -> str:
    """Write the table.

    Args:
        outcomes: the grids and the methods on all seeds, seed by seed.

    Returns:
        Lines without a newline at the end.
    """
    names = list(dict.fromkeys(o.method for o in outcomes))
    by_name = {name: [o for o in outcomes if o.method == name] for name in names}
    grid = by_name["grid"]
    rows = []
    for name, mine in by_name.items():
        valid, least = [o.valid for o in mine], [o.valid for o in grid]
        cells = [name, spread(valid, ".4f")]
        if name == "grid":
            cells += ["–"] * 3
        else:
            cells += [_signed(paired(valid, least)), f"{reached(valid, least)} of {len(mine)}"]
            cells += [f"{reached(last, least)} of {len(mine)}" if (last := [o.last for o in mine if o.curve]) else "–"]
        errors = [error for o in mine for error in o.errors]
        cells += [
            spread([o.test for o in mine], ".4f"),
            "–" if name == "grid" else _signed(paired([o.test for o in mine], [o.test for o in grid])),
            spread([o.accuracy for o in mine], ".3f"),
            f"{mine[0].trainings}",
            spread([o.seconds for o in mine], ".1f"),
            f"{max(errors):.0e}" if errors else "–",
        ]
        rows.append(cells)
    header = (
        "method", "valid. loss", "− grid", "reached", "last too", "test loss", "− grid", "accuracy", "trainings", "seconds",
        "hypergrad. error",
    )  # fmt: skip
    seeds = len(grid)
    notes = [
        "grid: the best of ten trainings by torch.optim.SGD, one for each rate, by validation loss.",
        f"fine: the same with {by_name['fine'][0].trainings} rates: how low one rate can go.",
        *(f"{name}: {METHODS[name].meaning}." for name in names if name in METHODS),
        "− grid: the paired difference to the grid's best, mean ± its standard error over seeds.",
        "learned runs: the hyperparameters of least validation loss among those of all updates, as a grid search chooses.",
        "reached: seeds on which the validation loss is at most that of the grid's best. last too: after the last update.",
        "trainings: how many were run; a learned run differentiates each of them.",
        "hypergrad. error: the largest relative error against central differences in float64, over seeds, at the start, at "
        "the chosen update and halfway there; where training diverges, differences see nothing.",
        f"{seeds} seed{'s: losses, accuracies and seconds are mean ± standard deviation' if seeds > 1 else ''}.",
    ]
    return table(header, rows) + "\n\n" + "\n".join(notes)


def _signed(difference: Paired) -> str:
    return f"{difference.mean:+.4f}" + ("" if difference.error is None else f" ± {difference.error:.4f}")
