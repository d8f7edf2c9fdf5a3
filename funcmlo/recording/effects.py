"""What a function does besides computing with tensors, seen as it runs: a function that does nothing else can be replayed.

A loss may print, count its calls or draw from numpy; its steps are then made one by one, as they are written. Whether it
does is not guessed from its text alone: the functions that are called are watched, and those of the user are read for
instructions that store where somebody else can see it. Doubt counts against a function.
"""

from __future__ import annotations

import builtins
import dis
import functools
import gc
import math
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

from funcmlo import _tree

_STANDARD = (
    "abc _collections_abc collections contextlib copy dataclasses enum functools hashlib importlib inspect itertools math "
    "numbers operator re string types typing warnings weakref _weakrefset"
)
_OURS = frozenset([*re.findall(r"\w+", _STANDARD), "torch", "funcmlo", "torchopt", "einops", _tree.LIBRARY])
"""Top-level modules whose own functions are known to keep to themselves."""

_PURE = frozenset(
    map(
        id,
        (abs, all, any, callable, divmod, format, getattr, hasattr, id, isinstance, issubclass, iter, len, max, min, pow,
         repr, round, sorted, sum, math.sqrt, math.log, math.exp, math.prod, math.ceil, math.floor, math.isclose),
    )
)  # fmt: skip
PROFILED = "a profiler is watching"
"""Why nothing can be seen, for now."""

_IMMUTABLE = (str, int, float, bool, tuple, complex, bytes, frozenset)
_READING = frozenset({"items", "keys", "values", "get", "copy", "index", "count"})
_LEAVES_TORCH = frozenset({"numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "share_memory_", "register_hook"})
_STORING = frozenset({"__setitem__", "__delitem__", "__setattr__", "__delattr__", "__dict__"})
_STORES = frozenset({"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR"})


@dataclass
class Watched:
    """What is known so far.

    Attributes:
        why: the first thing seen that a replay would leave out; None for nothing.
    """

    why: str | None = None


@contextmanager
def watching() -> Generator[Watched]:
    """Run a block and watch what its Python does.

    Yields:
        What is seen; where somebody else watches already (a profiler), that is what is said.
    """
    watched = Watched()
    if sys.getprofile() is not None:
        watched.why = PROFILED
        yield watched
        return

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if watched.why is not None or event not in ("call", "c_call"):
            return
        module = frame.f_globals.get("__name__", "")
        ours = _trusted(module)
        if event == "c_call":
            if isinstance(getattr(argument, "__self__", None), torch.Generator) and not module.startswith("funcmlo"):
                watched.why = "it seeds a generator"
            else:
                watched.why = _called(argument, ours)
        elif not ours:
            watched.why = _stores(frame.f_code)

    collecting = gc.isenabled()
    gc.disable()  # what runs when garbage is collected is nobody's doing
    sys.setprofile(see)
    try:
        yield watched
    finally:
        sys.setprofile(None)
        if collecting:
            gc.enable()


@functools.cache
def _trusted(module: str) -> bool:
    return module.partition(".")[0] in _OURS or module.startswith("namedtuple_")


def _called(function: Any, ours: bool) -> str | None:
    """What is wrong with calling something that is not written in Python, if anything."""
    name = getattr(function, "__name__", "?")
    owner = getattr(function, "__self__", None)
    if name in _LEAVES_TORCH and isinstance(owner, torch.Tensor):
        return f"it calls Tensor.{name}, which leaves torch"
    if ours or id(function) in _PURE or isinstance(owner, (torch.Tensor, *_IMMUTABLE)):
        return None
    module = getattr(function, "__module__", None) or (owner.__name__ if isinstance(owner, ModuleType) else "")
    if not module and owner is not None:
        module = type(owner).__module__ if not isinstance(owner, type) else owner.__module__
    if module.partition(".")[0] == "torch" or (isinstance(owner, (dict, list)) and name in _READING):
        return None
    if owner is sys or (owner is builtins and name == "__build_class__"):
        return None
    return f"it calls {name}"


@functools.lru_cache(maxsize=4096)
def _stores(code: CodeType) -> str | None:
    """What a function of the user's may store where others see it, if anything."""
    for step in dis.get_instructions(code):
        hidden = step.opname in {"LOAD_METHOD", "LOAD_ATTR"} and step.argval in _STORING
        if hidden or step.opname in _STORES or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
            return f"{code.co_name} stores {step.argval or 'an item'}"
    return None
