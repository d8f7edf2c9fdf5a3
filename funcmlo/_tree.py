"""Pytrees as a vector space: the only place that touches the pytree library.

A vector is any tree of floating-point tensors that optree knows (tensors, dicts, tuples, lists, named tuples,
registered classes); `None` is an empty tree. Leaves may differ in shape, dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor

from funcmlo import _leaves

Tree: TypeAlias = Any
"""A pytree of tensors; the type system cannot say more."""


LIBRARY = optree.__name__
"""The name of the pytree library's module."""


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves and the structure that puts them back together."""
    return optree.tree_flatten(tree)


def unflatten(structure: optree.PyTreeSpec, leaves: Iterable[Any]) -> Tree:
    """Put leaves back into a structure."""
    return optree.tree_unflatten(structure, leaves)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in the structure's order."""
    return optree.tree_leaves(tree)


def structure(tree: Tree) -> optree.PyTreeSpec:
    """Return the tree's structure alone."""
    return optree.tree_structure(tree)


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Return (readable path, leaf) pairs, for messages; the root's path is ``""``."""
    accessors, values, _ = optree.tree_flatten_with_accessor(tree)
    return [(accessor.codify(""), value) for accessor, value in zip(accessors, values, strict=True)]


def map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply a function leaf by leaf."""
    return optree.tree_map(function, tree, *rest)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply a function to the tensors of a tree and leave every other leaf as it is."""
    return map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def partition(tree: Tree) -> tuple[list[Tensor], Callable[[list[Tensor]], Tree]]:
    """Take the tensors out of a tree.

    Args:
        tree: any tree; leaves may be anything.

    Returns:
        Its tensors, and the function that puts tensors back in their places.
    """
    flat, spec = flatten(tree)

    def whole(tensors: list[Tensor]) -> Tree:
        replaced = iter(tensors)
        return unflatten(spec, [next(replaced) if isinstance(x, Tensor) else x for x in flat])

    return [x for x in flat if isinstance(x, Tensor)], whole


def floating(tree: Tree) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Tree]]:
    """Take the floating-point tensors out of a tree, those that can be differentiated by.

    Args:
        tree: any tree; leaves may be anything.

    Returns:
        Those tensors, and the function that puts tensors back in their places, beside the other leaves.
    """
    flat, spec = flatten(tree)
    chosen = [isinstance(x, Tensor) and x.is_floating_point() for x in flat]

    def whole(tensors: Iterable[Tensor]) -> Tree:
        replaced = iter(tensors)
        return unflatten(spec, [next(replaced) if c else x for c, x in zip(chosen, flat, strict=True)])

    return [x for c, x in zip(chosen, flat, strict=True) if c], whole


def like(tree: Tree, there: Tree) -> Tree:
    """Return a tree with its tensors on the devices of another's."""
    return map(lambda x, y: x.to(y.device) if isinstance(x, Tensor) and isinstance(y, Tensor) else x, tree, there)


def detach(tree: Tree) -> Tree:
    """Cut every tensor from its graph."""
    return map_tensors(Tensor.detach, tree)


def add(a: Tree, b: Tree) -> Tree:
    """Return a + b."""
    return map(torch.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    """Return a − b."""
    return map(torch.sub, a, b)


def scale(factor: float | Tensor, a: Tree) -> Tree:
    """Return factor · a, each leaf in its own dtype and on its own device."""
    return map(lambda x: _times(factor, x), a)


def add_scaled(a: Tree, factor: float | Tensor, b: Tree) -> Tree:
    """Return a + factor · b, each leaf in its own dtype and on its own device."""
    if not isinstance(factor, Tensor):
        return map(lambda x, y: torch.add(x, y, alpha=factor), a, b)
    return map(lambda x, y: x + _times(factor, y), a, b)


def negative(a: Tree) -> Tree:
    """Return −a."""
    return map(torch.neg, a)


def zeros_like(a: Tree) -> Tree:
    """Return the zero vector of a's space."""
    return map(torch.zeros_like, a)


def where(condition: Tensor, a: Tree, b: Tree) -> Tree:
    """Return a where a 0-d condition holds and b elsewhere, without branching on data."""
    return map(lambda x, y: torch.where(condition.to(x.device), x, y), a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """Return ⟨a, b⟩, a 0-d tensor accumulated in at least float32 on the last leaf's device."""
    xs = leaves(a)
    return _leaves.dot(xs, leaves(b), _widest(xs))


def norm(a: Tree) -> Tensor:
    """Return ‖a‖, the Euclidean norm over all leaves, a 0-d tensor; no float32 entry under- or overflows."""
    xs = leaves(a)
    return _leaves.norm(xs, _widest(xs))


def size(a: Tree) -> int:
    """Return the number of scalars in the tree."""
    return sum(x.numel() for x in leaves(a))


def precision(a: Tree) -> torch.dtype:
    """Return the dtype in which scalars about this tree are computed: the widest of its leaves, at least float32."""
    return _widest(leaves(a))


def coarsest_epsilon(a: Tree) -> float:
    """Return the machine epsilon of the least precise leaf (float32's for an empty tree)."""
    return max((torch.finfo(x.dtype).eps for x in leaves(a)), default=torch.finfo(torch.float32).eps)


def finite(tree: Tree) -> Tensor:
    """Return a 0-d flag on the last leaf's device: whether every floating-point tensor of the tree is finite."""
    return _leaves.finite([x for x in leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()])


def is_zero(a: Tree) -> Tensor:
    """Return a 0-d flag on the last leaf's device: whether every entry of the vector is zero."""
    flag = torch.ones((), dtype=torch.bool)
    for x in leaves(a):
        flag = flag.to(x.device) & (x == 0).all()
    return flag


def mismatch(expected: Tree, came: Tree) -> str | None:
    """Name the first difference in structure, shape or dtype between two trees, or return None.

    Args:
        expected: the tree of tensors that the caller holds to be right.
        came: the tree of tensors that is compared with it.

    Returns:
        A phrase that completes «… differ: …», or None when the trees agree.
    """
    if structure(expected) != structure(came):
        return f"structure {describe(came)}, expected {describe(expected)}"
    for (path, x), y in zip(named_leaves(expected), leaves(came), strict=True):
        if not isinstance(y, Tensor):
            return f"leaf{_at(path)} is {type(y).__name__}, expected a tensor"
        if x.shape != y.shape:
            return f"leaf{_at(path)} has shape {tuple(y.shape)}, expected {tuple(x.shape)}"
        if x.dtype != y.dtype:
            return f"leaf{_at(path)} has dtype {y.dtype}, expected {x.dtype}"
    return None


def describe(tree: Tree) -> str:
    """Write a tree's structure as a person would, with ``*`` for a leaf."""
    text = str(structure(tree))
    return text.removeprefix("PyTreeSpec(").removesuffix(")")


def register(cls: type, children: tuple[str, ...], constants: tuple[str, ...]) -> None:
    """Register a dataclass with optree's pytrees and torch's: some fields hold trees, others are constants.

    Args:
        cls: the class, whose constructor takes all fields by keyword.
        children: the fields that are subtrees.
        constants: the fields that stay outside every map, compared by equality.
    """

    def fixed(value: Any) -> tuple[Any, ...]:
        return tuple(_freeze(getattr(value, f)) for f in constants)

    def parts(value: Any) -> tuple[Any, ...]:
        return tuple(getattr(value, f) for f in children)

    def build(context: Any, subtrees: Iterable[Any]) -> Any:
        thawed = {f: _thaw(value) for f, value in zip(constants, context, strict=True)}
        return cls(**dict(zip(children, subtrees, strict=True)), **thawed)

    optree.register_pytree_node(
        cls, lambda v: (parts(v), fixed(v), children), build, namespace=optree.registry.__GLOBAL_NAMESPACE
    )

    # torch's pytrees count None as a leaf, which its transforms refuse: they see optree's leaves alone.
    def torch_flat(value: Any) -> tuple[list[Any], Any]:
        flat, inner = flatten(parts(value))
        return flat, (inner, fixed(value))

    def torch_build(flat: Iterable[Any], context: Any) -> Any:
        inner, rest = context
        return build(rest, unflatten(inner, flat))

    torch_pytree.register_pytree_node(
        cls, torch_flat, torch_build, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}"
    )


def _freeze(value: Any) -> Any:
    return ("dict", tuple(value.items())) if isinstance(value, dict) else ("value", value)


def _thaw(value: Any) -> Any:
    kind, content = value
    return dict(content) if kind == "dict" else content


def _widest(xs: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for x in xs:
        dtype = dtype if x.dtype is dtype else torch.promote_types(dtype, x.dtype)
    return dtype


def _times(factor: float | Tensor, x: Tensor) -> Tensor:
    """Return factor · x in x's dtype, on x's device; multiplied in the wider of the two dtypes, so that 1/ε fits."""
    if not isinstance(factor, Tensor):
        return x * factor
    if factor.device != x.device:
        factor = factor.to(x.device)
    if factor.dtype is x.dtype:
        return x * factor
    wide = torch.promote_types(factor.dtype, x.dtype)
    return (x.to(wide) * factor.to(wide)).to(x.dtype)


def _at(path: str) -> str:
    return f" {path}" if path else ""
