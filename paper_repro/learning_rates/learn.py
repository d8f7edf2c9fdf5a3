"""One run: the hyperparameters go downhill, one hypergradient through a whole training for each update."""

from __future__ import annotations

import time
from dataclasses import dataclass

import funcmlo as fm
from paper_repro.learning_rates.methods import METHODS, Rates, program
from paper_repro.learning_rates.problem import Problem, Score, Settings


@dataclass(frozen=True, eq=False)
class Learned:
    """What a run came to.

    Attributes:
        program: the two levels.
        states: after every update, none included: outer + 1 of them.
        scores: of the trainings at these states' hyperparameters.
        seconds: wall seconds of the steps, measuring left out.
    """

    program: fm.Multilevel
    states: list[fm.State]
    scores: list[Score]
    seconds: float

    @property
    def best(self) -> int:
        """The update after which the validation loss was least: the rule by which a grid search chooses."""
        return min(range(len(self.scores)), key=lambda k: self.scores[k].valid)

    @property
    def path(self) -> list[Rates]:
        """The hyperparameters after every update, none included."""
        return [state.params["rates"] for state in self.states]


def learn(problem: Problem, settings: Settings, method: str) -> Learned:
    """Learn the hyperparameters by one method.

    A step trains at the hyperparameters that it finds and then moves these; so one step more than there are updates
    says what the last ones are worth.

    Args:
        problem: the data and the start.
        settings: sizes and rates.
        method: a name in METHODS.

    Returns:
        The run.
    """
    learner = program(problem, settings, method)
    states = [learner.init({"rates": METHODS[method].start(problem, settings)})]
    scores, seconds = [], 0.0
    for _ in range(settings.outer + 1):
        begin = time.perf_counter()
        after, _ = learner.step(states[-1], {})
        seconds += time.perf_counter() - begin
        scores.append(problem.score(after.params["classifier"]))
        states.append(after)
    return Learned(learner, states[:-1], scores, seconds)
