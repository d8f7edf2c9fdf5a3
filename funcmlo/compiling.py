"""A program compiled: `Multilevel.compile`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, TypeVar

from funcmlo.compiler import Compiler
from funcmlo.errors import DefinitionError
from funcmlo.whole import Whole

_Program = TypeVar("_Program")


def compiled(program: _Program, *, unroll: Literal["step", "whole"] = "step") -> _Program:
    """Return a program that does the same with compiled inner steps and products.

    Inner steps, the derivatives of ITD's steps and Hessian-vector products become graphs that torch's inductor compiles,
    once for each form of parameters and batches, whatever the number of steps. Costs are taken to be pure: what they
    close over besides parameters, batches and buffers is fixed at the first call. Each compiled function is held against
    the eager one when it is first used; what differs by more than 2¹⁰ machine epsilons of the largest entry, draws
    random numbers or cannot be captured runs as it is written, with a warning that says why. So do levels with tasks,
    a projection, buffers of their own, autocast or an outside solver.

    Args:
        program: the program.
        unroll: `"step"`; or `"whole"`, one graph for all of a call to `step` or `hypergradient`, tasks and projections
            included, whose compilation takes longer the more inner steps and products there are (seconds to minutes).
            It needs fixed batches, and falls back to `"step"` where it cannot be had.

    Returns:
        The program; `print(program.compiler)` tells what was compiled.

    Raises:
        DefinitionError: `unroll` is neither.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=9, response=fm.ITD()),
        ...     fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.25)),
        ... )
        >>> fast = program.compile()
        >>> print(fast.compiler)
        nothing has been compiled yet
    """
    if unroll not in {"step", "whole"}:
        raise DefinitionError(f"compile(unroll={unroll!r}): expected 'step' or 'whole'.")
    fast: Any = copy.copy(program)
    written: Any = program
    plan = written._plan
    fast.compiler = Compiler()
    fast._plan = replace(plan, roles=replace(plan.roles, compiler=fast.compiler))
    fast._whole = Whole(written, plan, fast.compiler) if unroll == "whole" else None
    return fast  # type: ignore[no-any-return]
