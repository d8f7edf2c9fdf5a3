"""Forward-mode derivatives over pytrees, through torch.func's jvp."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcmlo import _diff, _reached, _tracing, _tree, precision
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError


def jvp_of_gradients(
    cost: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Tree], along: int, tangent: Tree
) -> tuple[Tree, ...]:
    """Return the derivative of a cost's gradients by every argument, along a direction of one of them.

    Forward mode over reverse mode: no graph of the gradients is built. For a cost g(y, x) along c in y it is
    (∇²_yy g c, ∇²_xy g c), because second derivatives commute.

    Args:
        cost: a function of the arguments that returns (0-d tensor, anything).
        arguments: trees of tensors.
        along: the number of the argument that is moved.
        tangent: the direction, a tree like that argument.

    Returns:
        One tree for each argument.
    """
    # Under a transform, or where grad mode is on, someone outside may differentiate what comes out.
    once = not (torch.is_grad_enabled() or _tracing.transforming())

    def walked(value: Tensor, extra: Any, pullback: _diff.Pullback) -> tuple[Tree, ...]:
        return pullback(torch.ones_like(value))

    def gradients(at: Tree) -> tuple[Tree, ...]:
        slopes: tuple[Tree, ...] = _diff.with_vjp_func(cost, [*arguments[:along], at, *arguments[along + 1 :]], walked, once)
        return slopes

    for argument in arguments:  # torch.func does not tell what it reaches
        _reached.tell(argument, _tree.leaves(argument))
    if not _tree.leaves(tangent):
        return tuple(_tree.zeros_like(argument) for argument in arguments)
    products: tuple[Tree, ...] = jvp(gradients, arguments[along], tangent)
    return products


def jvp(function: Callable[[Tree], Tree], at: Tree, tangent: Tree) -> Tree:
    """Return the derivative of a function along a direction, in forward mode: nothing of the way is kept.

    Args:
        function: a function of a tree of tensors to a tree of tensors; gradients that it takes inside by
            `value_and_grads` are differentiated again.
        at: where; it has at least one leaf.
        tangent: the direction, a tree like `at`.

    Returns:
        A tree like what the function returns.

    Raises:
        EstimatorError: an operation in it has no forward-mode derivative.
    """
    leaves, structure = _tree.flatten(at)
    shape: list[Any] = []

    def flat_function(*flat: Tensor) -> list[Tensor]:
        values, spec = _tree.flatten(function(_tree.unflatten(structure, flat)))
        shape.append(spec)
        return values

    _load_forward_mode()
    with _forward_errors():
        tangents = precision.in_range(
            lambda v: torch.func.jvp(flat_function, tuple(leaves), tuple(v))[1], _tree.leaves(tangent), forward=True
        )
    return _tree.unflatten(shape[-1], tangents)


@contextmanager
def _forward_errors() -> Generator[None]:
    """Say what to do about an operation without a forward-mode derivative."""
    try:
        yield
    except EstimatorError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        if not re.search(r"forward (mode )?AD|jvp", str(error)):
            raise
        raise EstimatorError(
            f"an operation of the loss has no forward-mode derivative ({str(error).splitlines()[0]}); use what takes none: "
            "ITD() in reverse mode without memory='mixed', PerturbedSolve(…), Hessian('kept')."
        ) from error


@functools.cache
def _load_forward_mode() -> None:
    """Let torch load what it loads at the first forward-mode derivative, where it warns of its own TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
