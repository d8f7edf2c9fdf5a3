"""Calls of a program compiled as a whole: one graph for all inner steps, solves and gradients together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._hiding import hiding
from funcmlo._tree import Tree
from funcmlo.batches import is_fixed
from funcmlo.compiler import Compiler
from funcmlo.recording.code import code
from funcmlo.recording.replay import split
from funcmlo.recording.tape import below_autograd, kind, record
from funcmlo.state import State

MOST = 4
"""How many captures of one call there may be that differ by numbers other than tensors."""

Call = Callable[[State, Mapping[str, Any]], Tree]


@dataclass(frozen=True, eq=False)
class Captured:
    """A call as one graph.

    Attributes:
        forward: tensors ↦ tensors.
        rebuild: what makes the answer of them.
    """

    forward: Callable[..., Any]
    rebuild: Callable[[list[Tensor]], Tree]


def answer(compiler: Compiler, name: str, call: Call, state: State, batches: Mapping[str, Any]) -> Tree | None:
    """Return what a call answers by its graph, captured and compiled at first use.

    Args:
        compiler: the program's.
        name: which call it is.
        call: a pure function of the state's tensors and of the batches.
        state: where the program stands; its step counters are not looked at.
        batches: fixed ones.

    Returns:
        The answer; None where the call has to be made as it is written.
    """
    if _tracing.unreadable() or not all(map(is_fixed, batches.values())):
        return None
    flat, structure = _tree.flatten((replace(state, step={}, seed=0), dict(batches)))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return None
    constants = tuple(kind(x) if isinstance(x, Tensor) else x for x in flat)
    known = compiler.of(name)
    key = structure, constants
    if key not in known:
        known[key] = None if len(known) >= MOST else _capture(compiler, name, call, state, batches)
    captured: Captured | None = known[key]
    if captured is None:
        return None
    with below_autograd():
        found, _ = captured.forward(*tensors)
    return captured.rebuild(list(found))


def _capture(
    compiler: Compiler, name: str, call: Call, state: State, batches: Mapping[str, Any]
) -> Captured | None:
    flat, structure = _tree.flatten((replace(state, step={}, seed=0), dict(batches)))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    box: list[Callable[[list[Tensor]], Tree]] = []

    def function(*given: Tensor) -> list[Tensor | None]:
        rest = iter(given)
        inside, some = _tree.unflatten(structure, [next(rest) if isinstance(x, Tensor) else x for x in flat])
        with hiding():
            found, whole = _tree.partition(call(replace(inside, step=state.step, seed=state.seed), some))
        box.append(whole)
        return list(found)

    _, tape, why = record(function, tensors, None)
    if tape is not None and why is None:
        parts = split(tape, len(tensors), 0, len(tape.outputs))
        if isinstance(parts, str):
            why = parts
        else:
            settings = parts, len(tensors), (), [kind(x) for x in tape.tensors]
            outside = [tape.constants[n] for n in parts.outside]
            made = compiler.make(name, settings, code(*settings)[0], outside, tensors)
            if not isinstance(made, str):
                with below_autograd():
                    forward, _ = made(outside)
                return Captured(forward, box[-1])
            why = made
    compiler.refuse(name, why)
    return None
