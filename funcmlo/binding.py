"""A level bound to where its program stands: its batches, its randomness and its buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from funcmlo import _diff
from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.hypergrad.solved import Standing
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.roles import Roles
from funcmlo.signature import BUFFERS, holder
from funcmlo.state import State


def bound(level: Level, feeds: Mapping[str, Feed], state: State, roles: Roles) -> Problem:
    """Return a level with its batches, its randomness and its buffers bound, at its next step.

    Args:
        level: the level.
        feeds: the batches of the levels that make updates.
        state: where the program stands.
        roles: what the program's levels have to do with tasks and with other processes.

    Returns:
        The problem.
    """
    feed = feeds.get(level.name, no_batch)  # of a level that only begins, no batch is asked
    name = level.name
    tasks, sharing = roles.tasks.get(name), roles.sharing.get(name)
    own = buffers(level, state)
    return Problem(level, feed, state.seed, state.step[name], own, tasks, sharing=sharing, compiler=roles.compiler)


def buffers(level: Level, state: State) -> dict[str, Tree]:
    """Return the buffers that a level's loss reads, by the names under which it does.

    Args:
        level: the level.
        state: where the program stands.

    Returns:
        Trees of buffers.
    """
    return {source: state.buffers[holder(source, level.name)] for source in level.cost_buffers}


def with_buffers(state: State, name: str, fixed: Mapping[str, Any]) -> State:
    """Return a state with a level's buffers as an update left them.

    Args:
        state: the state before.
        name: the level.
        fixed: what its loss reads as constants, after the update.

    Returns:
        The state.
    """
    return replace(state, buffers={**state.buffers, name: fixed[BUFFERS]}) if BUFFERS in fixed else state


def put(state: State, name: str, standing: Standing) -> State:
    """Return a state with a level's parameters and optimizer state."""
    params, opt_state = standing
    return replace(state, params={**state.params, name: params}, optimizer={**state.optimizer, name: opt_state})


def advanced(state: State, name: str, steps: int) -> State:
    """Return a state with a level's step counter ahead by some steps."""
    return replace(state, step={**state.step, name: state.step[name] + steps})


def no_batch(t: int) -> None:
    """The feed of a level that makes no update in this call."""


def next_cost(problem: Problem, params: Tree, inputs: dict[str, Tree]) -> Tensor:
    """Return a level's cost at its next step as a plain value; inside, the loss may take gradients, as in an update."""
    value, _, _ = _diff.vjp(lambda own, x: problem.cost(own, x, 0), [params, inputs])
    cost: Tensor = value
    return cost
