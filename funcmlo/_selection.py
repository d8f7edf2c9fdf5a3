"""Which parameters of a module are trained: by their own word, by a predicate, or by names and patterns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from funcmlo._modules import Place
from funcmlo.errors import DefinitionError, listing, suggest

Train: TypeAlias = Callable[[str], bool] | Collection[str] | None
"""A predicate on names; names and patterns such as ``"*.lora_*"``; or nothing, which asks `requires_grad`."""


def trained(module: str, parameters: Mapping[str, Place], train: Train) -> set[str]:
    """Return the names of the parameters that are trained.

    Args:
        module: what the module is called, for messages.
        parameters: its parameters by first name.
        train: who is trained; a tied parameter is where any of its names is.

    Returns:
        First names.

    Raises:
        DefinitionError: a pattern matches nothing, nothing is left, or what is chosen has no derivatives.
    """
    if train is None:
        chosen = {name for name, place in parameters.items() if place.read().requires_grad}
    elif callable(train):
        chosen = {name for name, place in parameters.items() if any(train(path) for path in place.paths)}
    else:
        chosen = _matching(module, parameters, train)
    if parameters and not chosen:
        raise DefinitionError(
            f"Stateless({module}) would have no parameter to train; "
            + ("all have requires_grad=False, and train= can name some." if train is None else "train= chooses none.")
        )
    for name in chosen:
        dtype = parameters[name].read().dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise DefinitionError(f"Stateless({module}): '{name}' is {dtype} and cannot be trained; leave it out of train=.")
    return chosen


def _matching(module: str, parameters: Mapping[str, Place], train: Iterable[str]) -> set[str]:
    patterns = [train] if isinstance(train, str) else list(train)
    first = {path: name for name, place in parameters.items() for path in place.paths}
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise DefinitionError(
                f"Stateless({module}, train=…): {type(pattern).__name__} came; expected names, patterns such as '*.bias', "
                "or a predicate on names."
            )
        found = {name for path, name in first.items() if fnmatchcase(path, pattern)}
        if not found:
            below = any(path.startswith(f"{pattern}.") for path in first)
            hint = f"; did you mean '{pattern}.*'?" if below else suggest(pattern.replace("*", ""), first)
            raise DefinitionError(
                f"Stateless({module}, train=…): '{pattern}' matches no parameter{hint} It has {listing(first)}."
            )
        chosen |= found
    return chosen
