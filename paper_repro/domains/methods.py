"""The programs that are compared: how the two lower levels are solved, and how one differentiates through them."""

from __future__ import annotations

from collections.abc import Callable

import torchopt

import funcmlo as fm
from paper_repro.domains.problem import Domains, Settings


def solved(problem: Domains, settings: Settings, response: fm.BestResponse) -> fm.Multilevel:
    """Return the program whose lower levels are solved to rounding by an outside solver."""
    return fm.Multilevel(
        fm.Level("pretrain", problem.pretrain, fm.Solver(problem.solve_pretrain), response=response),
        fm.Level("finetune", problem.finetune, fm.Solver(problem.solve_finetune), response=response),
        fm.Level("reweight", problem.reweight, torchopt.adam(settings.upper_lr)),
    )


def unrolled(problem: Domains, settings: Settings) -> fm.Multilevel:
    """Return the program whose lower levels make a few steps each, every time from the beginning.

    Pretrain runs before each update of finetune. Its `init=` makes the hypergradient the derivative of all that runs: a loop
    that went on from where the last one stopped would start at a point that depends on the weights too.
    """
    optimizer = torchopt.sgd(settings.lower_lr, momentum=0.9)
    return fm.Multilevel(
        fm.Level(
            "pretrain",
            problem.pretrain,
            optimizer,
            steps=settings.pretrain_steps,
            init=problem.classifier,
            response=fm.ITD(),
        ),
        fm.Level(
            "finetune",
            problem.finetune,
            optimizer,
            steps=settings.finetune_steps,
            init=lambda pretrain: pretrain,
            response=fm.ITD(),
        ),
        fm.Level("reweight", problem.reweight, torchopt.adam(settings.upper_lr)),
    )


EXACT = fm.AID(fm.CG(1_000, tol=1e-10))

METHODS: dict[str, Callable[[Domains, Settings], fm.Multilevel]] = {
    "cg": lambda problem, settings: solved(problem, settings, EXACT),
    "itd": unrolled,
    "finite-difference": lambda problem, settings: solved(problem, settings, fm.FiniteDifference()),
    "cg-per-example": lambda problem, settings: solved(problem, settings, EXACT),
}
PER_EXAMPLE = frozenset({"cg-per-example"})
"""The methods that are not told the styles; the others have one weight for each source."""


def variant(problem: Domains, method: str) -> Domains:
    """Return the problem with the weights that a method learns."""
    return problem.per_example() if method in PER_EXAMPLE else problem
