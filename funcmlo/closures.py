"""What a function closes over, looked at for tensors that are being differentiated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from funcmlo import _diff


def traced_closure(function: Callable[..., Any]) -> str | None:
    """Name a tensor that a function closes over and that is being differentiated.

    Only what the function itself holds is looked at: closures, globals, defaults, bound arguments, and lists, tuples,
    dicts and functions among them; not the attributes of objects.

    Args:
        function: any callable.

    Returns:
        The name by which the function knows the tensor; None if there is none.
    """
    return next((name for name, x in _tensors(function, depth=4) if _diff.traced(x)), None)


def _tensors(function: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(function, functools.partial):
        yield from _within("a bound argument", [function.args, function.keywords], depth)
        yield from _tensors(function.func, depth)
    elif inspect.ismethod(function):
        yield from _tensors(function.__func__, depth)
    elif inspect.isfunction(function):
        held = inspect.getclosurevars(function)
        defaults = {p.name: p.default for p in inspect.signature(function, follow_wrapped=False).parameters.values()}
        for name, value in {**held.globals, **held.nonlocals, **defaults}.items():
            yield from _within(name, value, depth)


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
