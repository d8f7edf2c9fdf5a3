"""What is being traced: which torch.func transforms are active, and which tensors somebody differentiates.

The only place that asks functorch about its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from funcmlo import _tree
from funcmlo._hiding import hidden
from funcmlo._tree import Tree


def transforming() -> bool:
    """Say whether a torch.func transform (grad, vjp, jvp, vmap) or forward mode is active: values may be traced."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _forward_mode()


def unreadable() -> bool:
    """Say whether values cannot be looked at: a transform is active, or the call is being captured as a whole."""
    return transforming() or hidden()


def differentiating() -> bool:
    """Say whether a torch.func transform that differentiates (grad, vjp, jvp) is active; vmap alone does not."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return _forward_mode() or any(i.key() != torch._C._functorch.TransformType.Vmap for i in stack)


def composing() -> bool:
    """Say whether derivatives must be levels of torch.func: some transform is active, and more than maps of a program."""
    return transforming() and (differentiating() or not _whole_program.get())


@contextmanager
def whole_program(whole: bool = True) -> Generator[None]:
    """Run a block in which maps, where nothing else is active, are known to surround all that is ever differentiated.

    Then plain autograd is good below the maps (`below_maps`). It is not inside of a custom derivative, which torch.func
    calls with levels set aside whose tensors may still be seen.

    Args:
        whole: whether that is known.
    """
    token = _whole_program.set(whole)
    try:
        yield
    finally:
        _whole_program.reset(token)


_whole_program: ContextVar[bool] = ContextVar("whole_program", default=False)


def mapping() -> bool:
    """Say whether torch.func.vmap is active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(i.key() == torch._C._functorch.TransformType.Vmap for i in stack)


def _forward_mode() -> bool:
    """Whether tangents are carried along (`torch.autograd.forward_ad`, which torch.func's jvp uses too)."""
    return bool(forward_ad._current_level >= 0)


def traced(x: Tensor) -> bool:
    """Say whether a tensor is part of something that is being differentiated, by autograd or by a torch.func transform."""
    while not (x.requires_grad or _has_tangent(x)):
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)  # below a map there may be a tensor that is differentiated
    return True


def carries_tangent(x: Tensor) -> bool:
    """Say whether forward mode carries a tangent along with a tensor, below maps too."""
    while not _has_tangent(x):
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def _has_tangent(x: Tensor) -> bool:
    if not _forward_mode() or torch._C._functorch.is_batchedtensor(x):
        return False
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def call_outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on copies of its arguments' tensors, outside of every transform, where they may leave torch.

    Args:
        function: what is called; it is not differentiated.
        *arguments: trees of anything.

    Returns:
        What it returns; under a map, which nothing can leave, it is called inside.
    """
    arguments = _tree.map_tensors(lambda x: untracked(x.detach().clone()), arguments)
    leaves = [x for x in _tree.leaves(arguments) if isinstance(x, Tensor)]
    with torch.no_grad():
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves) or not transforming():
            return function(*arguments)
        with temporarily_clear_interpreter_stack():
            return function(*arguments)


def untracked(x: Tensor) -> Tensor:
    """Return a detached tensor outside of the levels that differentiate it; what a map batches stays batched."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def alive(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that a backward pass was given, taken out of a level that is over.

    `torch.func.vjp` hands out a function that is called when its level is closed; what was saved there is still wrapped.
    """
    return [torch._C._functorch.unwrap_if_dead(x) for x in tensors]


def batched_by_autograd(x: Tensor) -> bool:
    """Say whether a cotangent is a batch of torch.autograd's own making (`is_grads_batched=True`, `vectorize=True`)."""
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def recording(*trees: Tree) -> bool:
    """Say whether what is computed from these trees is going to be differentiated by someone outside.

    Below a map a tangent cannot be seen, so in forward mode the answer is True.

    Args:
        *trees: trees whose leaves may be anything.

    Returns:
        Whether someone is.
    """
    if _forward_mode():
        return True
    return torch.is_grad_enabled() and any(traced(x) for x in _tree.leaves(trees) if isinstance(x, Tensor))


def lanes() -> Callable[[Tensor, slice], Tensor]:
    """Return, inside a function that torch.func.vmap maps, what makes a part of a stack of tensors the lanes of that map.

    As the map does with its operands, but wherever the tensor is needed, and without a copy.

    Returns:
        A function of a tensor and of the part of its first axis that is mapped.
    """
    functorch = torch._C._functorch
    level = functorch.maybe_current_level()
    assert level is not None

    def lane(x: Tensor, part: slice) -> Tensor:
        above = []  # what is not of the map's own level yet must not be wrapped by the levels inside of it
        try:
            while (current := functorch.maybe_current_level()) is not None and current >= level:
                above.append(functorch.pop_dynamic_layer_stack())
            x = x[part]
        finally:
            while above:
                functorch.push_dynamic_layer_stack(above.pop())
        return functorch._add_batch_dim(x, 0, level)

    return lane


def below_maps(function: Callable[..., Sequence[Tensor | None]], *lists: Sequence[Tensor] | None) -> list[Tensor | None]:
    """Call a function on the tensors that lie below every active map, where plain autograd is good.

    Lanes lead there, those of the outermost map first; what a map does not batch is repeated for its lanes, so that each
    lane has a derivative of its own.

    Args:
        function: what is called with as many lists of tensors, outside of the maps; it returns tensors of that kind.
        *lists: lists of tensors; None stays None.

    Returns:
        What it returns, as the tensors that the maps see.
    """
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack()
    if not stack or composing():
        return list(function(*lists))
    maps = [functorch.CVmapInterpreterPtr(interpreter) for interpreter in stack]

    def lowered(x: Tensor) -> Tensor:
        for one in reversed(maps):
            if functorch.is_batchedtensor(x) and functorch.maybe_get_level(x) == one.level():
                at, x = functorch.maybe_get_bdim(x), functorch.get_unwrapped(x)
                x = x.movedim(at, 0) if at else x
            else:
                x = x.expand(one.batchSize(), *x.shape)
        return x

    def raised(x: Tensor) -> Tensor:
        for one in maps:
            x = functorch._add_batch_dim(x, 0, one.level())
        return x

    below = [None if xs is None else [lowered(x) for x in xs] for xs in lists]
    with temporarily_clear_interpreter_stack():
        answer = function(*below)
    return [None if x is None else raised(x) for x in answer]
