"""One run of the three-level program."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

import funcmlo as fm
from paper_repro.domains.methods import METHODS, variant
from paper_repro.domains.problem import Domains, Settings


@dataclass(frozen=True, eq=False)
class Learned:
    """What a run came to.

    Attributes:
        problem: the problem with the groups that the method weights.
        program: the three levels.
        states: after every update of the third level, none included: outer + 1 of them.
        curve: test accuracy of the classifier finetuned under each of these states' weights.
        cost: the third level's cost at each of them.
        seconds: wall seconds of the steps, measuring left out.
        converged: whether every linear system was solved; None where there was none.
    """

    problem: Domains
    program: fm.Multilevel
    states: list[fm.State]
    curve: list[float]
    cost: list[float]
    seconds: float
    converged: bool | None

    @property
    def reweight(self) -> Tensor:
        """The learned λ."""
        found: Tensor = self.states[-1].params["reweight"]
        return found


def learn(problem: Domains, settings: Settings, method: str) -> Learned:
    """Learn the weights by one method.

    A step solves the lower levels under the weights that it finds and then moves these; so one step more than there
    are updates says what the last weights are worth.

    Args:
        problem: the data and costs.
        settings: sizes and rates.
        method: a name in METHODS.

    Returns:
        The run.
    """
    problem = variant(problem, method)
    program = METHODS[method](problem, settings)
    zero = problem.classifier()
    states = [program.init({"pretrain": zero, "finetune": zero, "reweight": problem.logits()})]
    curve, cost, seconds = [], [], 0.0
    converged: list[bool] = []
    for _ in range(settings.outer + 1):
        start = time.perf_counter()
        after, metrics = program.step(states[-1], {})
        seconds += time.perf_counter() - start
        curve.append(problem.accuracy(after.params["finetune"]))
        cost.append(float(metrics["reweight"]["cost"]))
        found = [stats.converged for stats in metrics["reweight"]["stats"].values() if stats.converged is not None]
        converged += [bool(solved) for solved in found]
        states.append(after)
    return Learned(problem, program, states[:-1], curve, cost, seconds, all(converged) if converged else None)
