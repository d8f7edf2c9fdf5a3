"""The loop of a run: step after step, with what is told, saved and looked at between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from funcmlo.errors import NonFiniteError
from funcmlo.roles import Roles
from funcmlo.state import State
from funcmlo.train import failures
from funcmlo.train.callbacks import Start
from funcmlo.train.flow import Flow, device_of
from funcmlo.train.history import History
from funcmlo.train.journal import Journal
from funcmlo.train.rows import memory, row
from funcmlo.train.settings import Settings
from funcmlo.train.told import Told
from funcmlo.train.validation import validated

Step: TypeAlias = Callable[[State, Mapping[str, Any]], tuple[State, dict[str, dict[str, Any]], dict[str, float]]]

IN_A_ROW = 20
"""How many steps may be skipped one after the other."""


class Running:
    """Where a run stands: after a step that was made, validated and written down.

    Args:
        state: the state.
        step: the outer steps made.
        drawn: the batches drawn, by level.
        history: a row for each of them.
    """

    def __init__(self, state: State, step: int, drawn: Mapping[str, int], history: History) -> None:
        self.now = state, step, drawn  # in one piece, so that an interrupt finds one standing or the other
        self.history = history

    def advance(self, state: State, drawn: Mapping[str, int], row: Mapping[str, float]) -> None:
        """Take a step over."""
        step = self.step + 1
        self.now = state, step, drawn
        self.history.append(step, row)

    @property
    def state(self) -> State:
        """The last good state."""
        return self.now[0]

    @property
    def step(self) -> int:
        """The outer steps made."""
        return self.now[1]


def run(
    step: Step,
    passed_over: Callable[[State], State],
    state: State,
    data: Mapping[str, Any],
    settings: Settings,
    told: Told,
    roles: Roles,
    about: Mapping[str, Any],
) -> tuple[State, Any]:
    """Run a program.

    Args:
        step: makes one outer step, and tells how long each level took.
        passed_over: a state ↦ the same with its counters as after a step.
        state: where the run begins.
        data: loaders, iterables, functions of the step or fixed batches, by level.
        settings: what `run` was told.
        told: who hears of it.
        roles: what the levels have to do with other processes.
        about: what is told of the program at first: fields of `Start`.

    Returns:
        The state reached and the history.

    Raises:
        BaseException: what ended the run, with its `state` and `history`.
    """
    journal = Journal(settings.checkpoint, settings.every, settings.keep, roles)
    state, begun, drawn, history = journal.begin(state)
    flow = Flow.of(data, state, settings.accumulate, drawn, roles.sharing)
    running = Running(state, begun, flow.drawn(), history)
    stopped: str = "steps"
    failed: BaseException | None = None
    size = roles.who()[1]
    with failures.terminable(told.interrupt if size > 1 else None) as calm:
        try:
            try:
                told.begin(Start(steps=settings.steps, begun=begun, seed=state.seed, history=history, **about))
                stopped = _steps(step, passed_over, running, flow, settings, told, journal)
            except KeyboardInterrupt:
                stopped = "interrupted"
            if stopped == "interrupted" and size > 1:  # the others may be elsewhere
                journal.rescue(*running.now)
            else:
                journal.save(*running.now)
        except BaseException as error:
            calm()
            failed = failures.clear(error, running.step + 1)
            where = journal.rescue(*running.now)
            failures.hand_over(failed, running.state, history.frame(), running.step, where)
            failures.announce(failed)
            if failed is error:
                raise
            raise failed from error
        finally:
            flow.close()
            journal.close()
            told.end(running.state, failed)
    return running.state, history.frame(stopped=stopped)


def _steps(
    step: Step,
    passed_over: Callable[[State], State],
    running: Running,
    flow: Flow,
    settings: Settings,
    told: Told,
    journal: Journal,
) -> str:
    """Make the steps that are left; return why they ended."""
    skipped, size = 0, journal.roles.who()[1]
    at = device_of(running.state.params)
    while running.step < settings.steps:
        begin = time.perf_counter()
        try:
            state, metrics, seconds = step(running.state, flow.batches)
            found, skipped = row(metrics, seconds), 0
        except NonFiniteError:
            skipped += 1
            if settings.on_nonfinite == "raise" or skipped > IN_A_ROW:
                raise
            state, found = passed_over(running.state), {"skipped": 1.0}
        found |= {"seconds": time.perf_counter() - begin, "memory": memory(at)}
        found |= validated(running.step + 1, state, settings.validate, settings.validate_every, size)
        journal.record(running.step + 1, found)
        running.advance(state, flow.drawn(), found)
        why = told.record(running.step, found, running.state)
        if journal.due(running.step):
            journal.save(*running.now)
        if why:
            return why
    return "steps"
