"""What is handed to a solution map: inputs by name, what of them is differentiated, and what must not be closed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._random import step_seed
from funcmlo._tree import Tree
from funcmlo.closures import traced_closure
from funcmlo.errors import BatchError, EstimatorError, ParameterError, listing, suggest
from funcmlo.hypergrad.base import BestResponse
from funcmlo.purity import untouched
from funcmlo.solution import REMEDY

START = "init="
"""The input by which a solution map's start is differentiated, where an estimator follows the steps; no argument's name."""


def named(owner: str, names: Sequence[str], inputs: Sequence[Tree], by_name: dict[str, Tree]) -> dict[str, Tree]:
    """Give the inputs their names, each once.

    Args:
        owner: who takes them, for messages.
        names: the names in order.
        inputs: what came by position.
        by_name: what came by name.

    Returns:
        The inputs by name, in order.

    Raises:
        ParameterError: inputs are missing, too many, unknown or there twice.
    """
    if len(inputs) > len(names):
        raise ParameterError(
            f"{owner}: {len(inputs)} inputs came, but {len(names)} are taken ({listing(names)}); a batch is handed in by "
            "name, batch=…."
        )
    x = dict(zip(names, inputs, strict=False))
    for name, value in by_name.items():
        if name not in names:
            raise ParameterError(f"{owner}: no input is called '{name}'{suggest(name, names)} Inputs: {listing(names)}.")
        if name in x:
            raise ParameterError(f"{owner}: input '{name}' came twice, by position and by name.")
        x[name] = value
    if missing := [name for name in names if name not in x]:
        raise ParameterError(
            f"{owner}: the inputs {listing(map(repr, missing))} did not come; expected solve(init, {listing(names)})."
        )
    return {name: x[name] for name in names}


def beginning(response: BestResponse, init: Tree, inputs: dict[str, Tree]) -> tuple[Tree, dict[str, Tree], Tree]:
    """Sort out what becomes of a solution map's start.

    Who follows the steps needs it, and differentiates by it where somebody asks for that; others only begin there.

    Args:
        response: the estimator.
        init: the start.
        inputs: the inputs that are differentiated by.

    Returns:
        The start as a mere beginning, the inputs with it where it is differentiated by, and it as a constant where it is
        needed and is not.
    """
    if response.requires != "replay":
        return _tree.detach(init), inputs, _tree.map(torch.clone, _tree.detach(init)) if response.uses_optimizer else None
    if _tracing.recording(init):
        return (), {**inputs, START: init}, None
    return (), inputs, _tree.map(torch.clone, init)


def begun(inputs: dict[str, Tree], constant: Tree, start: Tree) -> Tree:
    """Return a solution map's start from where `beginning` put it."""
    return inputs.get(START, start if constant is None else constant)


def drawn_seed(seed: int, owner: str, inputs: dict[str, Tree], solution: Tree) -> int:
    """Return the seed of what an estimator draws at a solution: the same for the same call, and another at another point.

    Solutions inside each other, or one in a training loop, would otherwise share their draws, and means over products of
    them would be biased. Under a map, where no value can be read, the seed alone decides.

    Args:
        seed: the solution map's own.
        owner: whose it is.
        inputs: where the solution is taken.
        solution: y*.

    Returns:
        The seed.
    """
    if _tracing.mapping():
        return step_seed(seed, f"{owner}.response", 0)
    point = [float(_tree.norm(_tree.detach(tree))) for tree in (solution, inputs)]
    return step_seed(seed, f"{owner}.response {point!r}", 0)


def check_mode(owner: str) -> None:
    """Raise in inference mode, where no gradient can be taken and a solver would stand still.

    Args:
        owner: who is called, for messages.

    Raises:
        EstimatorError: `torch.inference_mode` is on.
    """
    if torch.is_inference_mode_enabled():
        raise EstimatorError(f"{owner} takes gradients, which torch.inference_mode forbids; use torch.no_grad, or nothing.")


def ordinary(tree: Tree) -> Tree:
    """Return a tree with copies in place of tensors that were made in inference mode, which autograd refuses."""
    return _tree.map_tensors(lambda x: x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x, tree)


def reading(owner: str, init: Tree, x: dict[str, Tree], batch: Any) -> AbstractContextManager[None]:
    """Return a context that raises if what it runs writes to the start, to an input or to the batch.

    Args:
        owner: who reads them, for messages.
        init: the start.
        x: the inputs.
        batch: the batch.

    Returns:
        The context.
    """
    named = {f"{owner}: its init was": init, **{f"{owner}: its input '{name}' was": tree for name, tree in x.items()}}
    named |= {f"{owner}: its batch was": batch}
    return untouched(named, "The tensor that was handed in now holds the changed numbers.")


def check_init(owner: str, init: Tree) -> None:
    """Raise unless the start is a tree of floating-point tensors.

    Args:
        owner: who takes it, for messages.
        init: what came.

    Raises:
        ParameterError: it is not.
    """
    for path, leaf in _tree.named_leaves(init):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            came = f"a tensor of dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ParameterError(f"{owner}: init{path} is {came}; expected a tree of floating-point tensors.")


def constant_batch(owner: str, batch: Any) -> Any:
    """Return a batch, unless it is being differentiated: it is constant, so the derivative would be lost.

    Args:
        owner: who takes it, for messages.
        batch: what came.

    Returns:
        The batch.

    Raises:
        BatchError: a tensor of it is traced.
    """
    if any(isinstance(leaf, Tensor) and _tracing.traced(leaf) for leaf in _tree.leaves(batch)):
        raise BatchError(
            f"{owner}: the batch holds a tensor that is being differentiated, but a batch is constant; hand it in as an "
            "input instead, solve(init, …, data), or detach it."
        )
    return batch


def split(owner: str, x: dict[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Divide the inputs into those that can be differentiated by, trees of floating-point tensors, and the others.

    Args:
        owner: who takes them, for messages.
        x: the inputs by name.

    Returns:
        The vectors and the others, each by name.

    Raises:
        ParameterError: an input holds a traced tensor beside something that is no floating-point tensor.
    """
    vectors = {name: tree for name, tree in x.items() if _is_vector(tree)}
    others = {name: tree for name, tree in x.items() if name not in vectors}
    for name, tree in others.items():
        if any(isinstance(leaf, Tensor) and _tracing.traced(leaf) for leaf in _tree.leaves(tree)):
            raise ParameterError(
                f"{owner}: input '{name}' holds something that is differentiated beside something that is no floating-point "
                "tensor; hand them in as two inputs."
            )
    return vectors, others


def check_closures(
    owner: str, functions: Sequence[Any], value: Callable[[Tree, dict[str, Tree]], Tree], init: Tree, x: dict[str, Tree]
) -> None:
    """Refuse functions that depend on something traced that is no input: its derivative would be lost.

    Args:
        owner: who takes them, for messages.
        functions: what may close over tensors: functions, optimizers, or None.
        value: a function of the start and the inputs that has to be constant where both are.
        init: the start.
        x: the inputs.

    Raises:
        EstimatorError: something is closed over; the message names it where it can.
    """
    if not (torch.is_grad_enabled() or _tracing.transforming()):
        return
    for function in functions:
        if name := traced_closure(function):
            raise EstimatorError(
                f"{owner}: a function of it closes over '{name}', which is being differentiated; " + REMEDY.format(name=name)
            )
    if torch.is_grad_enabled() and any(map(_tracing.traced, _tree.leaves(value(_tree.detach(init), _tree.detach(x))))):
        raise EstimatorError(
            f"{owner}: a function of it depends on a tensor that is being differentiated (it requires grad) and that is no "
            "input; " + REMEDY.format(name="it")
        )


def _is_vector(tree: Tree) -> bool:
    return all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in _tree.leaves(tree))
