"""Derivatives over pytrees: the only place that chooses between plain autograd and torch.func.

Plain autograd is about four times cheaper per call on small problems; torch.func is what composes under its own
transforms. Both answer alike: outside every transform this module builds a graph on fresh aliases of its arguments
and walks it; inside one it opens a level of `torch.func` and walks the graph there. A graph kept past its level cannot be
walked again where it holds a custom derivative (`argmin`), so what walks it is handed in (`with_vjp`).

Aliases matter. ∂f(y, x)/∂y is a partial derivative even where x was computed from y, or is the same tensor as y
(an inner loop that starts at the meta-parameters), so f is always differentiated at an alias of y that nothing else
has seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from funcmlo import _reached, _tracing, _tree, precision
from funcmlo._tree import Tree
from funcmlo.errors import LossError


class Pullback(Protocol):
    """v ↦ (∂f/∂argument)ᵀ v for the chosen arguments; it may be called again and again."""

    def __call__(self, cotangent: Tree, *, wrt: Sequence[int] | None = None) -> tuple[Tree, ...]:
        """Return one cotangent tree for each argument in `wrt` (all of them when it is None)."""


def value_and_grads(
    cost: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Tree]
) -> tuple[Tensor, Any, tuple[Tree, ...], tuple[bool, ...]]:
    """Evaluate a cost and its gradients by every argument in one backward pass.

    The gradients join the surrounding graph when grad mode is on (`torch.enable_grad`), and are plain values otherwise.

    Args:
        cost: a function of the arguments that returns (0-d tensor, anything).
        arguments: trees of tensors.

    Returns:
        The cost, what came with it, the gradients, and for each argument whether the cost depends on it at all
        (under a torch.func transform that cannot be known, and the answer is True).
    """
    if _tracing.composing():
        return _value_and_grads_func(cost, arguments)
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = _aliases(arguments, record)
        value, extra = cost(*aliases)
    flat = [leaf for alias in aliases for leaf in _tree.leaves(alias)]
    if precision.scaling():
        grads = precision.in_range(
            lambda seed: _autograd([value], flat, seed, create_graph=record, retain_graph=record), [torch.ones_like(value)]
        )
    else:
        grads = _autograd([value], flat, None, create_graph=record, retain_graph=record)
    if not record:
        value, extra = value.detach(), _tree.detach(extra)
    trees, used = [], []
    for argument, alias in zip(arguments, aliases, strict=True):
        leaves, structure = _tree.flatten(alias)
        part, grads = grads[: len(leaves)], grads[len(leaves) :]
        used.append(any(g is not None for g in part))
        _reached.tell(argument, part)
        trees.append(_tree.unflatten(structure, _materialize(part, leaves)))
    return value, extra, tuple(trees), tuple(used)


def with_vjp(
    function: Callable[..., tuple[Tree, Any]], arguments: Sequence[Tree], body: Callable[[Tree, Any, Pullback], Tree]
) -> Tree:
    """Evaluate a function and do something with its vector-Jacobian products.

    Where an argument requires grad and grad mode is on, everything joins the surrounding graph, so that it can be
    differentiated again; else the answer is cut from the graph.

    Args:
        function: a function of the arguments that returns (tree of tensors, anything); gradients that it takes inside
            by `value_and_grads` are differentiated again.
        arguments: trees of tensors.
        body: `body(value, extra, pullback)` → a tree; the pullback is good inside it only.

    Returns:
        What the body returns.
    """
    if _tracing.composing():
        return with_vjp_func(function, arguments, body)
    record = _tracing.recording(*arguments)
    value, extra, pullback = _vjp(function, arguments, record)
    answer = body(value, extra, pullback)
    return answer if record or torch.is_grad_enabled() else _tree.detach(answer)


def vjp(
    function: Callable[..., tuple[Tree, Any]], arguments: Sequence[Tree], *, once: bool = False
) -> tuple[Tree, Any, Pullback]:
    """Evaluate a function and keep what its vector-Jacobian products need.

    Args:
        function: a function of the arguments that returns (tree of tensors, anything); gradients that it takes inside
            by `value_and_grads` are differentiated again.
        arguments: trees of tensors.
        once: whether the pullback is called once, and lets go of the graph as it walks it.

    Returns:
        The value, what came with it (both cut from the graph), and the pullback.
    """
    if _tracing.composing():
        return _vjp_func(function, arguments)
    value, extra, pullback = _vjp(function, arguments, record=False, once=once)
    return _tree.detach(value), _tree.detach(extra), pullback


def _vjp(
    function: Callable[..., tuple[Tree, Any]], arguments: Sequence[Tree], record: bool, once: bool = False
) -> tuple[Tree, Any, Pullback]:
    aliases = _aliases(arguments, record)
    with torch.enable_grad():
        value, extra = function(*aliases)
    return value, extra, _pullback(_tree.leaves(value), aliases, record, once, known=arguments)


def _pullback(
    outputs: list[Tensor], arguments: Sequence[Tree], record: bool, once: bool = False, known: Sequence[Tree] = ()
) -> Pullback:
    """The products by walking the graph between aliases of the arguments, `known` without, and the outputs.

    Args:
        outputs: what is differentiated.
        arguments: the aliases.
        record: whether the products join the surrounding graph.
        once: whether no graph is left behind.
        known: the arguments as the caller knows them.

    Returns:
        The pullback.
    """

    def pullback(cotangent: Tree, *, wrt: Sequence[int] | None = None) -> tuple[Tree, ...]:
        numbers = range(len(arguments)) if wrt is None else wrt
        chosen = [arguments[i] for i in numbers]
        flat = [leaf for argument in chosen for leaf in _tree.leaves(argument)]
        again = not once and (record or _tracing.recording(cotangent))
        grads = precision.in_range(
            lambda v: _autograd(outputs, flat, v, create_graph=again, retain_graph=not once), _tree.leaves(cotangent)
        )
        answer = []
        for i, argument in zip(numbers, chosen, strict=True):
            leaves, structure = _tree.flatten(argument)
            part, grads = grads[: len(leaves)], grads[len(leaves) :]
            if known:
                _reached.tell(known[i], part)
            answer.append(_tree.unflatten(structure, _materialize(part, leaves)))
        return tuple(answer)

    return pullback


def _autograd(
    outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor] | None, *, create_graph: bool, retain_graph: bool
) -> list[Tensor | None]:
    """`torch.autograd.grad`, also where no output is differentiable or no leaf is given."""

    def walk(outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor] | None) -> Sequence[Tensor | None]:
        live = [i for i, output in enumerate(outputs) if output.requires_grad]
        if not live or not leaves:
            return [None] * len(leaves)
        if cotangents is None:
            cotangents = [torch.ones_like(output) for output in outputs]
        return torch.autograd.grad(
            [outputs[i] for i in live],
            leaves,
            [cotangents[i] for i in live],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )

    try:
        with torch.enable_grad():
            return _tracing.below_maps(walk, outputs, leaves, cotangents)
    except RuntimeError as error:
        if "device meta" not in str(error):
            raise
        raise LossError(
            "a part of a loss is evaluated again in the backward pass, as torch.utils.checkpoint does, when the parameters "
            "have left its module; take the checkpoint out (ITD(memory='recompute') saves memory in its place)."
        ) from error


def _materialize(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


def _aliases(arguments: Sequence[Tree], record: bool) -> list[Tree]:
    """Aliases of the arguments; where the graph around them is joined, of what it has too."""
    alias = _alias if record else _leaf
    flats, structures = zip(*(_tree.flatten(argument) for argument in arguments), strict=True)
    flat = iter(_tracing.below_maps(lambda xs: [alias(x) for x in xs], [x for leaves in flats for x in leaves]))
    return [_tree.unflatten(s, itertools.islice(flat, s.num_leaves)) for s in structures]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x) if x.requires_grad else _leaf(x)


def _value_and_grads_func(
    cost: Callable[..., tuple[Tensor, Any]], arguments: Sequence[Tree]
) -> tuple[Tensor, Any, tuple[Tree, ...], tuple[bool, ...]]:
    def body(value: Tensor, extra: Any, pullback: Pullback) -> tuple[Tensor, Any, tuple[Tree, ...]]:
        return value, extra, pullback(torch.ones_like(value))

    value, extra, grads = with_vjp_func(cost, arguments, body)
    return value, extra, grads, (True,) * len(arguments)


def with_vjp_func(
    function: Callable[..., tuple[Tree, Any]],
    arguments: Sequence[Tree],
    body: Callable[[Tree, Any, Pullback], Tree],
    once: bool = False,
) -> Tree:
    """Do what `with_vjp` does at a level of torch.func; `once` for a pullback that is called once and leaves no graph."""
    box: list[Callable[[list[Tensor]], Tree]] = []

    def inside(*level: Tree) -> tuple[Tensor, list[Tensor]]:
        value, extra = function(*level)
        # functorch always builds the graph on: its outer levels are told by it what happened inside.
        pullback = _pullback(_tree.leaves(value), level, record=not once, once=once)
        tensors, whole = _tree.partition(body(value, extra, pullback))
        box.append(whole)
        return torch.zeros(()), tensors  # vjp wants an output

    _, tensors, _ = _vjp_func(inside, arguments)
    return box[-1](tensors)


def _vjp_func(function: Callable[..., tuple[Tree, Any]], arguments: Sequence[Tree]) -> tuple[Tree, Any, Pullback]:
    # torch.func keeps its own pytree registry; it sees flat lists of tensors only.
    flats, structures = zip(*(_tree.flatten(argument) for argument in arguments), strict=True)
    box: dict[str, Any] = {}

    def flat_function(*flat: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        value, extra = function(*(_tree.unflatten(s, leaves) for s, leaves in zip(structures, flat, strict=True)))
        leaves, box["value"] = _tree.flatten(value)
        extras, box["extra"] = _tree.flatten(extra)
        box["constants"] = [None if isinstance(x, Tensor) else x for x in extras]
        return leaves, [x for x in extras if isinstance(x, Tensor)]

    outputs, pull, kept = torch.func.vjp(flat_function, *flats, has_aux=True)  # type: ignore[misc]

    def pullback(cotangent: Tree, *, wrt: Sequence[int] | None = None) -> tuple[Tree, ...]:
        flat = precision.in_range(lambda v: _tree.leaves(pull(v)), _tree.leaves(cotangent))
        answer = []
        for structure in structures:
            part, flat = flat[: structure.num_leaves], flat[structure.num_leaves :]
            answer.append(_tree.unflatten(structure, part))
        return tuple(answer if wrt is None else (answer[i] for i in wrt))

    tensors = iter(kept)
    extras = [next(tensors) if x is None else x for x in box["constants"]]
    return _tree.unflatten(box["value"], outputs), _tree.unflatten(box["extra"], extras), pullback
