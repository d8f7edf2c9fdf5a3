"""What a function closes over, looked at for tensors that are being differentiated."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor

from funcmlo import _tracing


def traced_closure(function: Callable[..., Any]) -> str | None:
    """Name a tensor that a function closes over and that is being differentiated.

    Only what the function itself holds is looked at: closures, globals, defaults, bound arguments, and lists, tuples,
    dicts and functions among them; not the attributes of objects.

    Args:
        function: any callable, or a tuple of them such as an optimizer.

    Returns:
        The name by which the function knows the tensor; None if there is none.
    """
    return next((name for name, x in _within("the optimizer", function, depth=8) if _tracing.traced(x)), None)


def _tensors(function: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(function, functools.partial):
        yield from _within("an argument bound by partial", function.args, depth)
        for name, value in function.keywords.items():
            yield from _within(name, value, depth)
        yield from _tensors(function.func, depth)
    elif inspect.ismethod(function):
        yield from _tensors(function.__func__, depth)
    elif inspect.isfunction(function):
        for name, value in {**_globals(function), **_cells(function), **_defaults(function)}.items():
            yield from _within(name, value, depth)


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that a function, or one that is defined in it, really loads (an attribute's name is none)."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name: function.__globals__[name] for name in names if name in function.__globals__}


def _cells(function: FunctionType) -> dict[str, Any]:
    """What a function closes over; a cell may still be empty."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _defaults(function: FunctionType) -> dict[str, Any]:
    return {p.name: p.default for p in inspect.signature(function, follow_wrapped=False).parameters.values()}


def _within(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _within(name, item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _within(name, item, depth - 1)
    elif depth and (inspect.isfunction(value) or inspect.ismethod(value) or isinstance(value, functools.partial)):
        yield from _tensors(value, depth - 1)
