"""Finiteness, checked once per outer step and outside every transform, in the order in which things arise."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import NonFiniteError
from funcmlo.fold import Folded
from funcmlo.unroll import Run


def check(name: str, runs: Mapping[str, Run], folded: Folded, params: Tree | None) -> None:
    """Raise at the first thing that is not finite.

    Args:
        name: the level whose hypergradient was taken.
        runs: the inner loops below it.
        folded: its total gradient.
        params: its parameters after the update; None where there was none.

    Raises:
        NonFiniteError: a cost, a level's parameters or the hypergradient is infinite or NaN; the message says which,
            where, and what to try.
    """
    for lower, run in runs.items():
        if run.costs and not _tree.all_finite(torch.stack(run.costs)):
            t, cost = next((t, float(cost)) for t, cost in enumerate(run.costs) if not torch.isfinite(cost))
            _refuse(
                f"level '{lower}': its cost is {cost} at inner step {t + 1} of {len(run.costs)}; lower its learning "
                "rate or look at its batch."
            )
        if not _tree.all_finite(run.solved.params):
            _refuse(
                f"level '{lower}': its parameters are no longer finite after {run.solved.steps} inner steps; lower its "
                "learning rate, or look for a gradient that is infinite where the cost is not."
            )
    if not torch.isfinite(folded.cost):
        _refuse(f"level '{name}': its cost is {float(folded.cost)}; look at its batch and its parameters.")
    if not _tree.all_finite(folded.gradient):
        _refuse(
            f"level '{name}': its hypergradient is not finite although its cost is; the best responses' stats: "
            f"{folded.plain_stats()}."
        )
    if params is not None and not _tree.all_finite(params):
        _refuse(f"level '{name}': its parameters are no longer finite after its update; lower its learning rate.")


def _refuse(message: str) -> None:
    raise NonFiniteError(f"{message} The state that came in is still good.")
