"""Trees as plain containers, which any torch can open without running code.

Dicts, lists, tensors, numbers, strings and None stand for themselves. Everything else is a tuple that begins with its
kind: `("tuple", [...])`, `("OrderedDict", {...})`, `("NamedTuple", class, {field: ...})`, `("dataclass", class,
{field: ...})`, `("dtype", "float32")`, `("device", "cpu")`, `("strided", numbers, shape, strides)`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import CheckpointError, suggest
from funcmlo.train.strides import restored, stored

Plain: TypeAlias = Any
"""What a file holds."""

_ATOMS = (type(None), bool, int, float, str)
_CPU = torch.device("cpu")


def encode(tree: Tree, where: str = "") -> Plain:
    """Return a tree as plain containers.

    Args:
        tree: dicts (keys are strings or integers), lists, tuples, named tuples, frozen or registered dataclasses, tensors,
            numbers, strings, None, dtypes and devices.
        where: what the tree is, for messages.

    Returns:
        The same as plain containers; tensors are not copied if they fill their storage.

    Raises:
        CheckpointError: something in the tree is of another kind.

    Example:
        >>> encode({"rate": 0.1, "pair": (1, None)})
        {'rate': 0.1, 'pair': ('tuple', [1, None])}
    """
    cls = type(tree)
    if cls in _ATOMS:
        return tree
    if isinstance(tree, Tensor):
        return stored(_ordinary(tree, where))
    if cls is torch.dtype:
        return ("dtype", str(tree).removeprefix("torch."))
    if cls is torch.device:
        return ("device", str(tree))
    below = children(tree)
    if below is None:
        raise CheckpointError(
            f"{where or 'a tree'} holds {_article(cls)}, which a checkpoint cannot keep: make it a NamedTuple or a frozen "
            "dataclass of tensors, numbers and strings (a number of NumPy's: int(…) or float(…))."
        )
    if cls in (dict, OrderedDict):
        for key in below:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"{where or 'a tree'} has a dict with the key {key!r} ({type(key).__name__}); a checkpoint keeps keys "
                    "that are strings or integers."
                )
    plain = {key: encode(value, where + step(tree, key)) for key, value in below.items()}
    if cls is dict:
        return plain
    if cls is list:
        return list(plain.values())
    if cls is tuple:
        return ("tuple", list(plain.values()))
    if cls is OrderedDict:
        return ("OrderedDict", plain)
    return ("dataclass" if dataclasses.is_dataclass(cls) else "NamedTuple", class_name(cls), plain)


def decode(plain: Plain, known: Mapping[str, type], there: Tree = None, device: torch.device = _CPU) -> Tree:
    """Return the tree that `encode` made plain containers of.

    Args:
        plain: the plain containers.
        known: the classes that may be rebuilt, by name; nothing is imported.
        there: a tree like it: a tensor comes to the device of the tensor at its place.
        device: where the other tensors come.

    Returns:
        The tree.

    Raises:
        CheckpointError: a class is not known or has other fields, or the plain containers are none of `encode`'s.

    Example:
        >>> decode({"pair": ("tuple", [1, None])}, known={})
        {'pair': (1, None)}
    """

    def rebuilt(content: Any) -> dict[Any, Any]:
        place = children(there) or {}
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {key: decode(value, known, place.get(key), device) for key, value in pairs}

    if type(plain) in _ATOMS:
        return plain
    if isinstance(plain, Tensor):
        return _ordinary(plain, "the file").detach().to(_place(there, device))
    if type(plain) is dict:
        return rebuilt(plain)
    if type(plain) is list:
        return list(rebuilt(plain).values())
    match plain if type(plain) is tuple else ():
        case ("tuple", list(items)):
            return tuple(rebuilt(items).values())
        case ("OrderedDict", dict(items)):
            return OrderedDict(rebuilt(items))
        case ("NamedTuple" | "dataclass" as kind, str(name), dict(fields)):
            return _made(kind, _known(name, known), rebuilt(fields))
        case ("strided", Tensor() as core, list(shape), list(strides)):
            return restored(core.detach().to(_place(there, device)), shape, strides)
        case ("dtype", str(name)) if isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        case ("device", str(name)):
            return torch.device(name)
    raise CheckpointError(f"the file holds {_article(type(plain))} that stands for nothing: fm.save did not write it.")


def children(node: Any) -> Mapping[Any, Any] | None:
    """Return what a node is made of, by key, position or field; None for a leaf."""
    cls = type(node)
    if cls in (dict, OrderedDict):
        return node  # type: ignore[no-any-return]
    if cls in (list, tuple):
        return dict(enumerate(node))
    if _is_named_tuple(cls):
        return dict(zip(cls._fields, node, strict=True))
    if dataclasses.is_dataclass(cls) and (_frozen(cls) or not _is_leaf(node)):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(cls)}
    return None


def step(node: Any, key: Any) -> str:
    """Write the way from a node to its part as Python would."""
    return f"[{key!r}]" if type(node) in (dict, OrderedDict, list, tuple) else f".{key}"


def class_name(cls: type) -> str:
    """Return the name under which a file knows a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def classes(tree: Tree) -> dict[str, type]:
    """Return the classes that a tree is made of, by name: those that a file needs to have rebuilt."""
    below = children(tree)
    if below is None:
        return {}
    found = {} if type(tree) in (dict, OrderedDict, list, tuple) else {class_name(type(tree)): type(tree)}
    for value in below.values():
        found |= classes(value)
    return found


def _made(kind: str, cls: Any, fields: dict[str, Any]) -> Any:
    """An instance as it was, without its constructor, which may look at or change what it is given."""
    is_tuple = _is_named_tuple(cls)
    own: list[str] = list(cls._fields) if is_tuple else [field.name for field in dataclasses.fields(cls)]
    if is_tuple != (kind == "NamedTuple") or set(own) != set(fields):
        raise CheckpointError(
            f"{class_name(cls)} is a {kind} of ({', '.join(fields)}) in the file and of ({', '.join(own)}) in this program: "
            "it was changed since; go on with the code that wrote the file."
        )
    if is_tuple:
        return tuple.__new__(cls, (fields[name] for name in own))
    made: Any = object.__new__(cls)
    for name in own:
        object.__setattr__(made, name, fields[name])
    return made


def _known(name: str, known: Mapping[str, type]) -> type:
    if name not in known:
        raise CheckpointError(
            f"the file holds a {name}, a class that this program's state does not have{suggest(name, known)} Nothing is "
            "imported from a file: go on with the program that wrote it, whose first state has that class."
        )
    return known[name]


def _ordinary(x: Tensor, where: str) -> Tensor:
    """The tensor, if a file can keep its numbers."""
    kind = type(x).__name__
    if type(x) not in (Tensor, torch.nn.Parameter) and not isinstance(x, torch.nn.Buffer):
        came = f"a {kind}, a class of tensors of its own"
    elif x.layout != torch.strided or x.is_quantized:
        came = f"a tensor that is {'quantized' if x.is_quantized else f'of layout {x.layout}'}"
    elif x.device.type == "meta":
        came = "a tensor on the device 'meta', which has no numbers"
    else:
        return x
    raise CheckpointError(f"{where or 'a tree'} holds {came}; a checkpoint keeps ordinary strided tensors.")


def _place(there: Any, device: torch.device) -> torch.device:
    return there.device if isinstance(there, Tensor) and there.device.type != "meta" else device


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _frozen(cls: type) -> bool:
    return bool(cls.__dataclass_params__.frozen)  # type: ignore[attr-defined]


def _is_leaf(node: Any) -> bool:
    """Whether the package's trees end at a node: it is of no class that was registered."""
    return any(leaf is node for leaf in _tree.leaves(node))


def _article(cls: type) -> str:
    name = cls.__name__ if cls.__module__ == "builtins" else class_name(cls)
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
