"""What a function reads, from its signature: argument names are level names.

The rules, for losses, `init` functions and optimizer factories alike:

- a parameter without a default is read, by position, or by keyword where it is keyword-only;
- a parameter with a default, or bound by `functools.partial`, is a constant;
- `reads={"argument": "level"}` renames, and declares what `*args` and `**kwargs` receive (in its order);
- `batch` is the level's batch, `buffers` its own buffers, `<level>_buffers` another level's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from funcmlo.errors import DefinitionError, listing

BATCH = "batch"
BUFFERS = "buffers"
_BUFFERS_OF = "_buffers"


@dataclass(frozen=True)
class Call:
    """How to call a function with the values that it reads.

    Attributes:
        function: the function.
        positional: the sources of its positional arguments, after the level's own parameters if it takes those.
        keyword: (argument, source) pairs passed by keyword.
        constants: the arguments that keep their defaults.
    """

    function: Callable[..., Any]
    positional: tuple[str, ...] = ()
    keyword: tuple[tuple[str, str], ...] = ()
    constants: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything that is read: level names, `batch` and buffers."""
        return (*self.positional, *(source for _, source in self.keyword))

    @property
    def levels(self) -> tuple[str, ...]:
        """The level names that are read, each once."""
        return tuple(dict.fromkeys(s for s in self.sources if s != BATCH and not are_buffers(s)))

    @property
    def buffers(self) -> tuple[str, ...]:
        """The buffers that are read, `buffers` or `<level>_buffers`, each once."""
        return tuple(dict.fromkeys(filter(are_buffers, self.sources)))

    def __call__(self, *own: Any, values: Mapping[str, Any]) -> Any:
        """Call the function with the level's own parameters, where it takes them, and the named values."""
        return self.function(
            *own,
            *(values[source] for source in self.positional),
            **{argument: values[source] for argument, source in self.keyword},
        )


def are_buffers(source: str) -> bool:
    """Say whether a source is some level's buffers."""
    return source == BUFFERS or source.endswith(_BUFFERS_OF)


def holder(source: str, own: str) -> str:
    """Return the level whose buffers a source is.

    Args:
        source: `buffers` or `<level>_buffers`.
        own: the level that reads it.

    Returns:
        The level's name.
    """
    return own if source == BUFFERS else source.removesuffix(_BUFFERS_OF)


def read_call(
    function: Callable[..., Any], reads: Mapping[str, str] | None, *, owner: str, own: bool
) -> tuple[Call, str | None]:
    """Work out what a function reads.

    Args:
        function: any callable; decorators that keep `__wrapped__` are seen through.
        reads: sources by argument name, where the names do not say it.
        owner: who declares the function, for messages, such as «Level 'w': its loss».
        own: whether the first argument is the level's own parameters.

    Returns:
        The call, and the name of the first argument when `own` (None where only `*args` is there).

    Raises:
        DefinitionError: the signature cannot be read, or does not say what its arguments are.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise DefinitionError(
            f"{owner} has no signature that can be read ({error}); wrap it in a function whose arguments are level names."
        ) from None
    reads = dict(reads or {})
    rest = next((p for p in parameters if p.kind is _VAR_POSITIONAL), None)
    extra = next((p for p in parameters if p.kind is _VAR_KEYWORD), None)
    first = _take_own(parameters, owner) if own else None

    positional, keyword, constants = [], [], []
    for parameter in parameters:
        if parameter.kind in (_VAR_POSITIONAL, _VAR_KEYWORD):
            continue
        declared = reads.pop(parameter.name, None)
        if declared is None and parameter.default is not inspect.Parameter.empty:
            constants.append(parameter)
            continue
        source = declared or parameter.name
        by_keyword = parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not inspect.Parameter.empty
        if by_keyword:
            keyword.append((parameter.name, source))
        else:
            positional.append(source)

    if rest is not None and not reads:
        raise DefinitionError(
            f"{owner} takes *{rest.name}, which does not say what it reads; declare it with "
            'reads={"argument": "level"}, in the order of the arguments.'
        )
    skipped = [p.name for p in constants if p.kind in _BY_POSITION]
    if reads and rest is not None and skipped:
        raise DefinitionError(
            f"{owner} has defaults before *{rest.name} ({listing(skipped)}), which what *{rest.name} receives would fill; "
            "make them keyword-only, or bind them with functools.partial."
        )
    if reads and rest is not None:
        positional.extend(reads.values())
    elif reads and extra is not None:
        keyword.extend(reads.items())
    elif reads:
        names = listing(p.name for p in parameters)
        raise DefinitionError(
            f"{owner} has no argument {listing(repr(name) for name in reads)} that reads= names; its arguments: {names}."
        )
    return Call(function, tuple(positional), tuple(keyword), tuple(p.name for p in constants)), first


def declared_in(function: Callable[..., Any], reads: Mapping[str, str] | None) -> dict[str, str]:
    """Return the part of a declaration that a second function of the same level has arguments for.

    Args:
        function: the function.
        reads: sources by argument name, as declared for the level's loss.

    Returns:
        Those whose argument names the function has.
    """
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {argument: source for argument, source in (reads or {}).items() if argument in names}


def reads_nothing(function: Callable[..., Any]) -> bool:
    """Say whether a function says nothing of what it reads, as builtins and those of `*args`: it takes one argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return all(p.kind in (_VAR_POSITIONAL, _VAR_KEYWORD) for p in parameters)


_VAR_POSITIONAL = inspect.Parameter.VAR_POSITIONAL
_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _take_own(parameters: list[inspect.Parameter], owner: str) -> str | None:
    """Remove the level's own parameters from the front of the signature."""
    if parameters and parameters[0].kind in _BY_POSITION:
        return parameters.pop(0).name
    if parameters and parameters[0].kind is _VAR_POSITIONAL:
        return None
    raise DefinitionError(
        f"{owner} takes no positional argument; its first one must be the level's own parameters: def loss(params, …)."
    )
