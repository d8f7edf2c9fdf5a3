"""What `run` may be told, checked before anything runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from funcmlo.errors import BatchError, DefinitionError, listing, suggest
from funcmlo.state import State

Validate = Callable[[State], Any]


@dataclass(frozen=True)
class Settings:
    """What `run` was told.

    Attributes:
        steps: outer steps in total.
        checkpoint: the folder of checkpoints; None for none.
        every: outer steps between two of them.
        keep: how many of them stay.
        validate: functions of the state, by name.
        validate_every: outer steps between two calls of each.
        on_nonfinite: what happens to a step that comes upon what is not finite.
        accumulate: how many of a level's batches make one of its updates, by level.
    """

    steps: int
    checkpoint: Path | None
    every: int
    keep: int
    validate: Mapping[str, Validate]
    validate_every: Mapping[str, int]
    on_nonfinite: Literal["raise", "skip"]
    accumulate: Mapping[str, int]


def checked(
    levels: Sequence[str],
    *,
    steps: Any,
    checkpoint: Any,
    every: Any,
    keep: Any,
    validate: Any,
    validate_every: Any,
    on_nonfinite: Any,
    accumulate: Any,
) -> Settings:
    """Return what `run` was told, or say what has no meaning.

    Args:
        levels: the names of the program's levels.
        steps: outer steps in total.
        checkpoint: a folder.
        every: outer steps between two checkpoints.
        keep: how many of them stay.
        validate: a function of the state, or several by name.
        validate_every: outer steps between two calls; by name where they differ.
        on_nonfinite: `"raise"` or `"skip"`.
        accumulate: a number for all levels that draw batches, or numbers by level.

    Returns:
        The settings.

    Raises:
        DefinitionError: something has no meaning.
    """
    if on_nonfinite not in ("raise", "skip"):
        raise DefinitionError(f"run(on_nonfinite={on_nonfinite!r}): expected 'raise' or 'skip'.")
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise DefinitionError(f"run(checkpoint={checkpoint!r}): expected a folder's name, or None.")
    functions = {"valid": validate} if callable(validate) else {} if validate is None else validate
    if not isinstance(functions, Mapping) or not all(callable(f) for f in functions.values()):
        raise DefinitionError(
            f"run(validate={validate!r}): expected a function of the state that returns a number or a dict of numbers, or "
            "a dict of such functions."
        )
    return Settings(
        steps=_count("steps", steps, least=0),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        every=_count("every", every),
        keep=_count("keep", keep),
        validate=dict(functions),
        validate_every=_by_name("validate_every", validate_every, functions),
        on_nonfinite=on_nonfinite,
        accumulate={} if accumulate is None else _by_name("accumulate", accumulate, levels),
    )


def check_data(data: Any, levels: Iterable[str]) -> None:
    """Raise unless data come by the names of levels.

    Args:
        data: what the user gave.
        levels: the names of the program's levels.

    Raises:
        BatchError: they do not.
    """
    names = list(levels)
    if not isinstance(data, Mapping):
        raise BatchError(f"data came as {type(data).__name__}; expected a dict from level names to loaders or batches.")
    for name in data:
        if name not in names:
            raise BatchError(f"data names '{name}', which is no level{suggest(str(name), names)} Levels: {listing(names)}.")


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise DefinitionError(f"run({name}={value!r}): expected an integer of at least {least}.")
    return int(value)


def _by_name(name: str, value: Any, known: Iterable[str]) -> dict[str, int]:
    """A number for each name: the same one, or those given, 1 for the others."""
    names = list(known)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, _count(name, value))
    for key in value:
        if key not in names:
            raise DefinitionError(
                f"run({name}=…) names {key!r}{suggest(str(key), names)} Expected {listing(map(repr, names))}."
            )
    return {key: _count(f"{name}[{key!r}]", value.get(key, 1)) for key in names}
