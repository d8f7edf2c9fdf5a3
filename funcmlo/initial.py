"""A program's first state, from what the user gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError, ParameterError, listing, suggest
from funcmlo.hypergrad.base import BestResponse
from funcmlo.level import Level
from funcmlo.signature import holder
from funcmlo.state import State
from funcmlo.tasks import Slice, Tasks


def first_state(
    levels: Sequence[Level],
    users: Mapping[str, Sequence[str]],
    tasks: Mapping[str, Tasks],
    params: Mapping[str, Tree],
    buffers: Mapping[str, Tree],
    seed: int,
) -> State:
    """Return a program's first state.

    Args:
        levels: the levels, lowest first.
        users: for each level, the levels that may differentiate through it, in either composition.
        tasks: what the levels have to do with tasks.
        params: each level's parameters; those of a level with `init=` may be missing.
        buffers: each level's buffers; those of a level whose buffers no loss reads may be missing.
        seed: where all randomness comes from.

    Returns:
        The state before the first step, on copies of the parameters.

    Raises:
        EstimatorError: inference mode is on.
        ParameterError: something that came is not as expected.
    """
    names = [level.name for level in levels]
    if torch.is_inference_mode_enabled():
        raise EstimatorError(
            "init makes parameters that gradients are taken by, which torch.inference_mode forbids; use torch.no_grad, or "
            "nothing."
        )
    if not isinstance(params, Mapping):
        raise ParameterError(f"init takes a dict from level names to parameters; {type(params).__name__} came.")
    if not isinstance(buffers, Mapping):
        raise ParameterError(f"init takes buffers= as a dict from level names to buffers; {type(buffers).__name__} came.")
    for what, given in (("parameters", params), ("buffers", buffers)):
        for name in given:
            if name not in names:
                raise ParameterError(
                    f"init got {what} for '{name}', which is no level{suggest(name, names)} Levels: {listing(names)}."
                )
    seed = _random.checked_seed("init", seed)

    own: dict[str, Tree] = {}
    for level in levels:
        if level.name in params:
            own[level.name] = _parameters(level.name, _own_tasks(level, tasks, params[level.name], "parameter"))
        elif level.init is None:
            raise ParameterError(f"init got no parameters for level '{level.name}'; levels: {listing(names)}.")
    waiting = [level for level in reversed(levels) if level.name not in own]
    while waiting:  # an `init` may read levels whose own parameters come from an `init`
        ready = [level for level in waiting if all(source in own for source in level.start_levels)]
        if not ready:
            raise ParameterError(
                f"init got no parameters for {listing(repr(x.name) for x in waiting)}, whose init= read one another; pass "
                "one of them."
            )
        level = ready[0]
        with _random.seeded(_random.step_seed(seed, f"{level.name}.init", 0)):
            own[level.name] = _parameters(level.name, _start(level, tasks.get(level.name), own, seed))
        waiting.remove(level)
    return State(
        params={name: own[name] for name in names},
        optimizer={level.name: _optimizer(level, tasks.get(level.name), own) for level in levels},
        response={x.name: _response(x, users[x.name], tasks.get(x.name), own[x.name]) for x in levels},
        buffers=_buffers(levels, tasks, buffers),
        step=dict.fromkeys(names, 0),
        seed=seed,
    )


def _start(level: Level, tasks: Tasks | None, own: dict[str, Tree], seed: int) -> Tree:
    """Where a level's loop begins, in every task."""
    if tasks is None or not tasks.own:
        return level.starting_point(own)
    # Each part draws as its inner loops will, so that "the same" is the same however tasks are grouped.
    return tasks.values(lambda part: _start_of_part(level, tasks, own, part, seed))


def _start_of_part(level: Level, tasks: Tasks, own: dict[str, Tree], part: Slice, seed: int) -> Tree:
    lane = tasks.lane(part)
    with _random.seeded(_random.step_seed(seed, f"{level.name}.init" + (f"[{lane}]" if lane else ""), 0)):
        return level.starting_point(tasks.inputs(own, part))


def _optimizer(level: Level, tasks: Tasks | None, own: dict[str, Tree]) -> Tree:
    """The first state of a level's optimizer, in every task."""
    if tasks is None or not tasks.own:
        return level.optimizer_for(own).init(own[level.name])
    return tasks.values(lambda part: level.optimizer_for(tasks.inputs(own, part)).init(part(own[level.name])))


def estimator_state(response: BestResponse, params: Tree, tasks: Tasks | None) -> Any:
    """Return an estimator's first state, in every task.

    Args:
        response: the estimator.
        params: the parameters of the level that it answers for.
        tasks: what the level has to do with tasks.

    Returns:
        The state.
    """
    if tasks is None or not tasks.own:
        return response.init(params)
    return tasks.values(lambda part: response.init(part(params)))


def _response(level: Level, users: Sequence[str], tasks: Tasks | None, params: Tree) -> Any:
    """The state of a level's estimator, or of each of its estimators where several levels differentiate through it."""
    if isinstance(level.response, BestResponse):
        given = dict.fromkeys(users, level.response)
    else:
        given = {upper: level.response[upper] for upper in users if upper in level.response}
    if len(users) > 1:
        return {upper: estimator_state(given[upper], params, tasks) if upper in given else None for upper in users}
    alone = level.response if isinstance(level.response, BestResponse) else next(iter(given.values()), None)
    return None if alone is None else estimator_state(alone, params, tasks)


def _own_tasks(level: Level, tasks: Mapping[str, Tasks], tree: Tree, what: str) -> Tree:
    """This process's part of a task level's tree; raise unless its tensors lead with the task axis."""
    if level.tasks is None:
        return tree
    for path, leaf in _tree.named_leaves(tree):
        if isinstance(leaf, Tensor) and (not leaf.dim() or leaf.shape[0] != level.tasks):
            raise ParameterError(
                f"level '{level.name}' has {level.tasks} tasks, but its {what} {path} has shape {tuple(leaf.shape)}; "
                f"expected ({level.tasks}, …), as fm.per_task(tree, {level.tasks}) makes them"
                + (", or init=lambda …: … for the level." if what == "parameter" else ".")
            )
    return tasks[level.name].mine(tree, level.tasks)


def _buffers(levels: Sequence[Level], tasks: Mapping[str, Tasks], given: Mapping[str, Tree]) -> dict[str, Tree]:
    """Copy the buffers, or say what is missing or is none."""
    for level in levels:
        for source in level.cost_buffers:
            if (name := holder(source, level.name)) not in given:
                raise ParameterError(
                    f"init got no buffers for level '{name}', which the loss of level '{level.name}' reads as "
                    f"'{source}'; pass buffers={{'{name}': net.buffers()}}."
                )
    for name, tree in given.items():
        for path, leaf in _tree.named_leaves(tree):
            if not isinstance(leaf, Tensor):
                raise ParameterError(f"level '{name}': buffer {path} is {type(leaf).__name__}; expected a tensor.")
    own = {level.name: _own_tasks(level, tasks, given.get(level.name, {}), "buffer") for level in levels}
    return {name: _tree.map(lambda x: x.detach().clone(), tree) for name, tree in own.items()}


def _parameters(name: str, tree: Tree) -> Tree:
    """Copy a level's parameters, or say what is no parameter."""
    for path, leaf in _tree.named_leaves(tree):
        where = f"level '{name}': parameter{' ' + path if path else ''}"
        if not isinstance(leaf, Tensor):
            raise ParameterError(f"{where} is {type(leaf).__name__}; expected a floating-point tensor: {_remedy(leaf)}.")
        if not leaf.is_floating_point():
            raise ParameterError(f"{where} has dtype {leaf.dtype}; expected a real floating-point dtype: use .float().")
    return _tree.map(lambda x: x.detach().clone(), tree)


def _remedy(leaf: Any) -> str:
    """Say how to make a parameter of what came."""
    if isinstance(leaf, torch.nn.Module):
        return "wrap the module, net = fm.Stateless(module), and pass net.params()"
    if isinstance(leaf, (int, float)):
        return f"torch.tensor({float(leaf)!r})"
    return "trees are dicts, lists, tuples and classes that the pytree library optree knows"
