"""Whether what a file holds fits a program, and the state made of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import CheckpointError, listing, suggest
from funcmlo.state import State
from funcmlo.train.encoding import Plain, children, class_name, classes, decode, encode, step
from funcmlo.train.manifest import TREES, DamagedError
from funcmlo.train.state_classes import LIBRARY

_FIELDS = (*TREES, "step")


def taken_apart(state: State) -> Plain:
    """Return a state as plain containers.

    Args:
        state: the state.

    Returns:
        A dict with the fields' names.

    Raises:
        CheckpointError: it holds what a file cannot keep; says at which level.
    """
    plain: dict[str, Plain] = {
        field: {level: encode(tree, f"level '{level}': {name}") for level, tree in getattr(state, field).items()}
        for field, name in TREES.items()
    }
    return {**plain, "step": dict(state.step), "seed": state.seed}


def fitted(plain: Plain, like: State, *, seed_matters: bool) -> State:
    """Return the state that a file holds, if it fits a program.

    Args:
        plain: what `taken_apart` returned.
        like: a state of the program.
        seed_matters: whether another seed is an error.

    Returns:
        The state, its tensors on the devices of those of `like`.

    Raises:
        CheckpointError: it does not fit; says which level and tree differ, and how.
        DamagedError: it is no state at all.
    """
    if not isinstance(plain, dict) or set(plain) != {*_FIELDS, "seed"} or not all(type(plain[f]) is dict for f in _FIELDS):
        raise DamagedError("state.pt holds no state of a program")
    if not all(type(n) is int for n in (plain["seed"], *plain["step"].values())):
        raise DamagedError("state.pt holds steps or a seed that are no integers")
    for field in _FIELDS:
        _same_levels(field, plain[field], getattr(like, field))
    if seed_matters and plain["seed"] != like.seed:
        raise CheckpointError(
            f"it was made with seed {plain['seed']}, and this program's state has seed {like.seed}: begin with "
            f"program.init(…, seed={plain['seed']}) to go on with it, or choose another folder for another seed."
        )
    known = LIBRARY | classes([getattr(like, field) for field in TREES])
    trees = {field: _field(field, plain[field], like, known) for field in TREES}
    return State(**trees, step=plain["step"], seed=plain["seed"])


def difference(expected: Tree, came: Tree, at: str = "", *, none_is_open: bool = False) -> str | None:
    """Name the first difference between two trees in classes, keys, shapes and dtypes.

    Args:
        expected: a tree of the program's.
        came: the file's.
        at: where in the whole tree both stand.
        none_is_open: whether None, where it is expected, stands for anything.

    Returns:
        A phrase, or None where they agree.
    """
    if expected is None and none_is_open:
        return None
    place = f"{at} " if at else ""
    if isinstance(expected, Tensor) and isinstance(came, Tensor):
        found = _tree.mismatch(expected, came)
        return None if found is None else found.replace("leaf", f"leaf {at}".rstrip(), 1)
    if type(expected) is not type(came):
        return f"{place}is {_kind(came)}, expected {_kind(expected)}"
    mine, theirs = children(expected), children(came)
    if mine is None or theirs is None:
        return None  # numbers and strings may change from step to step
    missing, unknown = [k for k in mine if k not in theirs], [k for k in theirs if k not in mine]
    if missing or unknown:
        parts = [f"lacks {_some(missing)}" if missing else "", f"has {_some(unknown)} besides" if unknown else ""]
        return place + " and ".join(filter(None, parts))
    for key in mine:
        if found := difference(mine[key], theirs[key], at + step(expected, key), none_is_open=none_is_open):
            return found
    return None


def _same_levels(field: str, came: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise unless a file has a program's levels."""
    what = "levels" if field == "params" else f"{TREES.get(field, 'step')} of levels"
    for level in expected:
        if level not in came:
            raise CheckpointError(f"it lacks level '{level}' of this program; its {what}: {listing(came)}.")
    for level in came:
        if level not in expected:
            raise CheckpointError(
                f"it has level '{level}', which is none of this program's{suggest(level, expected)} The program's {what}: "
                f"{listing(expected)}."
            )


def _field(field: str, came: dict[str, Plain], like: State, known: dict[str, type]) -> dict[str, Tree]:
    """One of the state's trees of every level."""
    made = {}
    for level, plain in came.items():
        expected, what = getattr(like, field)[level], f"level '{level}' differs in its {TREES[field]}"
        try:
            made[level] = decode(plain, known, expected, _home(like.params[level]))
        except DamagedError:
            raise
        except (CheckpointError, RuntimeError) as error:  # torch's own, too: no such device, out of memory
            raise CheckpointError(f"{what}: {error}") from error
        if found := difference(expected, made[level], none_is_open=field == "response"):
            raise CheckpointError(f"{what}: {found}. Go on with the program that wrote it, or choose another folder.")
    return made


def _home(params: Tree) -> torch.device:
    """The device of a level, if all its parameters are on one: there goes what the first state has no tensor for."""
    devices = {x.device for x in _tree.leaves(params) if isinstance(x, Tensor) and x.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else torch.device("cpu")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value is None:
        return "nothing (None)"
    cls = type(value)
    return cls.__name__ if cls.__module__ == "builtins" else class_name(cls)


def _some(keys: Iterable[Any]) -> str:
    """The first few of some keys."""
    names = [str(key) for key in keys]
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
