"""The package's own exceptions and warnings: one family, each says what came, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FuncmloError(Exception):
    """Base of every exception that funcmlo raises on purpose."""


class DefinitionError(FuncmloError, ValueError):
    """A level, a program or an estimator was declared in a way that has no meaning."""


class ParameterError(FuncmloError, ValueError):
    """A tree of parameters has the wrong names, structure, shapes or dtypes."""


class BatchError(FuncmloError, ValueError):
    """A batch is missing, exhausted, or of a kind that does not fit the call."""


class LossError(FuncmloError, ValueError):
    """A level's loss returned something that is not a cost."""


class NonFiniteError(FuncmloError, FloatingPointError):
    """A cost, a gradient or a level's parameters became infinite or NaN."""


class EstimatorError(FuncmloError, ValueError):
    """A best response was used where it cannot work, or answered in a form that is not a best response's."""


class CheckpointError(FuncmloError, OSError):
    """A checkpoint cannot be written, is damaged, or does not fit the program."""


class ProcessError(FuncmloError, RuntimeError):
    """Processes that work together do not agree, or one of them is gone."""


class OutOfMemoryError(FuncmloError, MemoryError):
    """A step needed more memory than there is."""


class FuncmloWarning(UserWarning):
    """Something is legal and yet probably not what was meant."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Say «; did you mean …?» when a known name is close to the one that came, and «.» otherwise."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def listing(names: Iterable[str]) -> str:
    """Join names for a message, or say that there are none."""
    return ", ".join(str(name) for name in names) or "none"
