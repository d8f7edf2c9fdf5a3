"""What a level's fields may be."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

import torch

from funcmlo import precision
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.base import BestResponse
from funcmlo.signature import BATCH, Call, are_buffers
from funcmlo.solver import Solver
from funcmlo.tasks import Randomness


def check_fields(level: Any) -> None:
    """Raise unless a level's fields have a meaning.

    Args:
        level: the level, its signatures not yet read.

    Raises:
        DefinitionError: a field has none; the message says which and what is expected.
    """
    name = level.name
    if not isinstance(name, str) or not name.isidentifier():
        raise DefinitionError(f"a level's name is an argument name, so an identifier is expected; {name!r} came.")
    if name == BATCH or are_buffers(name):
        raise DefinitionError(f"level name '{name}' is reserved for what losses read besides levels; choose another.")
    if not callable(level.loss):
        raise DefinitionError(f"level '{name}': loss must be a function, but {type(level.loss).__name__} came.")
    if isinstance(level.optimizer, torch.optim.Optimizer) or type(level.optimizer).__module__.startswith("torchopt.optim"):
        kind = type(level.optimizer).__name__
        raise DefinitionError(
            f"level '{name}': {kind} keeps its state inside itself; expected a functional optimizer, such as "
            f"torchopt.{kind.removeprefix('Meta').lower()}(lr)."
        )
    origin = (getattr(level.optimizer, "__module__", None) or "").partition(".")[0]
    if level.optimizer is Solver:
        raise DefinitionError(f"level '{name}': optimizer=Solver is not called; expected fm.Solver(function).")
    module = getattr(level.optimizer, "__module__", None) or ""
    if not is_transformation(level.optimizer) and (origin in {"torch", "torchopt"} or module.startswith("funcmlo.optim")):
        raise DefinitionError(
            f"level '{name}': optimizer={getattr(level.optimizer, '__name__', level.optimizer)!r} is not called; expected "
            "a functional optimizer such as torchopt.sgd(0.1)."
        )
    if not (is_transformation(level.optimizer) or callable(level.optimizer) or isinstance(level.optimizer, Solver)):
        raise DefinitionError(
            f"level '{name}': optimizer must be a functional optimizer such as torchopt.sgd(0.1), or a function of "
            f"level names that returns one; {type(level.optimizer).__name__} came."
        )
    for what in ("steps", "warmup"):
        number = getattr(level, what)
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 0:
            raise DefinitionError(f"level '{name}': {what}={number!r}; expected an integer of at least 0.")
    _check_response(level)
    for what in ("init", "project"):
        function = getattr(level, what)
        if function is not None and not callable(function):
            raise DefinitionError(f"level '{name}': {what} must be a function, but {type(function).__name__} came.")
    for what in ("maximize", "roll_back", "replay"):
        if not isinstance(getattr(level, what), bool):
            raise DefinitionError(f"level '{name}': {what}={getattr(level, what)!r}; expected True or False.")
    if level.init is not None and (level.warmup or level.roll_back):
        raise DefinitionError(
            f"level '{name}': with init= every inner loop begins afresh, so warmup= and roll_back= have no meaning; "
            "leave them out."
        )
    if level.roll_back and not level.steps:
        raise DefinitionError(f"level '{name}': roll_back=True with steps=0: there is no inner loop to return from.")
    precision.check(name, level.autocast, level.loss_scale)
    for what in ("tasks", "chunk"):
        number = getattr(level, what)
        if what == "chunk" and number == "measure":
            if level.tasks is None:
                raise DefinitionError(
                    f"level '{name}': chunk='measure' times the loop of a level with tasks=, which it has not; leave chunk= "
                    "out, and the level takes over that of the tasks that it reads."
                )
        elif number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
            also = ", 'measure'" if what == "chunk" else ""
            raise DefinitionError(f"level '{name}': {what}={number!r}; expected an integer of at least 1{also}, or None.")
    if level.randomness not in get_args(Randomness):
        raise DefinitionError(f"level '{name}': randomness={level.randomness!r}; expected 'different' or 'same'.")
    if not (level.reduce is None or level.reduce in ("mean", "sum") or callable(level.reduce)):
        raise DefinitionError(
            f"level '{name}': reduce={level.reduce!r}; expected 'mean', 'sum', a function of the tasks' costs, or None."
        )
    if level.tasks is not None and level.reduce != "mean":
        raise DefinitionError(
            f"level '{name}': reduce= says what becomes of tasks' costs in a level that reads them and has none; with "
            "tasks= it has no meaning: leave it out."
        )
    if level.reads is not None and not (
        isinstance(level.reads, Mapping) and all(isinstance(x, str) for pair in level.reads.items() for x in pair)
    ):
        raise DefinitionError(
            f"level '{name}': reads must be a dict from argument names to level names, but {level.reads!r} came."
        )


def _check_response(level: Any) -> None:
    several = isinstance(level.response, Mapping)
    if isinstance(level.response, Mapping):
        object.__setattr__(level, "response", dict(level.response))
    for response in level.responses if several else (level.response,):
        if not isinstance(response, BestResponse):
            made = " (call it: ITD())" if isinstance(response, type) else ""
            raise DefinitionError(
                f"level '{level.name}': response={response!r} is no best response{made}; expected ITD(), AID(CG(20)), "
                "FiniteDifference() or a BestResponse of your own, or a dict of them by level name."
            )
        if isinstance(level.optimizer, Solver) and response.requires != "solution":
            raise DefinitionError(
                f"level '{level.name}': {type(response).__name__} follows inner steps, but an outside solver makes none; "
                "use AID(…), which looks at the solution."
            )


def check_sources(name: str, call: Call | None, what: str) -> None:
    """Raise unless a function of a level reads what it can.

    Args:
        name: the level's name.
        call: the function; None for none.
        what: what the function is to the level.

    Raises:
        DefinitionError: it reads what it cannot.
    """
    for source in call.sources if call else ():
        if are_buffers(source) and what != "loss":
            raise DefinitionError(f"level '{name}': its {what} reads '{source}'; only a loss can read buffers.")
        if source == BATCH and what not in {"loss", "solver"}:
            raise DefinitionError(f"level '{name}': its {what} reads a batch; only a loss or a solver can.")
        if source == name:
            raise DefinitionError(
                f"level '{name}': its {what} reads '{source}', the level itself; its own parameters are the "
                f"first argument, so write them there: def {what}({source}, …)."
            )


def is_transformation(value: Any) -> bool:
    """Say whether a value has a functional optimizer's `init`/`update` pair (a torchopt class does not count)."""
    return (
        not isinstance(value, type) and callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    )
