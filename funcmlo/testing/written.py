"""Values written as the Python code that makes them again, to the bit: what a failing check prints."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

from funcmlo.describe import describe
from funcmlo.errors import ParameterError


def code(value: Any) -> str:
    """Write a value as the Python code that makes it again.

    `eval(code(x))` equals x to the bit, in a namespace that has `torch`, `torchopt` and the classes that x is made of.
    Only the values of tensors are kept, not their strides or graphs, and of a NaN not its payload.

    Args:
        value: a tree of tensors, numbers and texts: dicts, lists, (named) tuples, None, and dataclasses with such fields,
            which are written without the fields that have their defaults. A torchopt transformation is written as what
            `transformation` was given; another one as far as `describe` sees it, its settings to six digits.

    Returns:
        One line of code.

    Raises:
        ParameterError: part of the value cannot be written as code, such as a function.

    Example:
        >>> import torch
        >>> code({"w": torch.zeros(2, 3, dtype=torch.float64), "b": [torch.tensor([0.1, 2.0]), None]})
        "{'w': torch.zeros(2, 3, dtype=torch.float64), 'b': [torch.tensor([0.1, 2.0], dtype=torch.float32), None]}"
    """
    if isinstance(value, Tensor):
        return _tensor(value.detach())
    if isinstance(value, GradientTransformation):
        return _optimizer(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({_fields(value)})"
    if isinstance(value, dict):
        items = "{" + ", ".join(f"{code(k)}: {code(v)}" for k, v in value.items()) + "}"
        return f"OrderedDict({items})" if isinstance(value, OrderedDict) else items
    if isinstance(value, torch.Size):
        return repr(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(f'{k}={code(v)}' for k, v in zip(value._fields, value, strict=True))})"
    if isinstance(value, tuple):
        return f"({_listed(value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{_listed(value)}]"
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({[*sorted(value)]!r})" if value else f"{type(value).__name__}()"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    if value is None or isinstance(value, (bool, int, str, bytes, complex, torch.dtype)):
        return repr(value)
    raise ParameterError(
        f"code: a value of type {type(value).__name__} cannot be written as code; expected tensors, numbers, texts, None, "
        "dicts, lists, tuples, and dataclasses with such fields."
    )


class Written:
    """Base of frozen dataclasses whose repr is the code that makes them again; two are equal if that code is.

    A subclass is declared with `@dataclass(frozen=True, repr=False, eq=False)`, so that these methods stay. Fields may be
    tensors and trees of them.
    """

    def __repr__(self) -> str:
        """Write the code that makes it again, without the fields that have their defaults."""
        return code(self)

    def __eq__(self, other: object) -> bool:
        """Say whether the other is of the same class and of the same numbers, to the bit."""
        return type(other) is type(self) and code(other) == code(self)

    def __hash__(self) -> int:
        """Return the hash of the code."""
        return hash(code(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython and hypothesis print."""
        del cycle
        printer.text(code(self))


def transformation(text: str) -> GradientTransformation:
    """Return the torchopt transformation that some code makes, with that code as its repr.

    Args:
        text: an expression of Python that begins at `torchopt`.

    Returns:
        The transformation.

    Raises:
        ParameterError: the code makes something else.

    Example:
        >>> transformation("torchopt.sgd(0.1, momentum=0.9)")
        torchopt.sgd(0.1, momentum=0.9)
    """
    made = eval(text, {"torchopt": torchopt})  # the caller's own code, as if it stood there
    if not isinstance(made, GradientTransformation):
        raise ParameterError(f"transformation: {text!r} makes {type(made).__name__}; expected a torchopt transformation.")
    # A subclass, because a transformation is a named tuple and takes no attributes; a chain stays a chain.
    named = type("Written", (type(made),), {"__repr__": lambda self: text, "_code": text})
    answer: GradientTransformation = named(*getattr(made, "transformations", made))
    return answer


def _tensor(x: Tensor) -> str:
    place = "" if x.device.type == "cpu" else f", device='{x.device}'"
    rest = f"dtype={x.dtype}{place})"
    shape = ", ".join(map(str, x.shape)) or "()"
    zero, one = (torch.full((), v, dtype=x.dtype, device=x.device) for v in (0, 1))
    if _same(x, zero.expand(x.shape)):
        return f"torch.zeros({shape}, {rest}"
    if x.dim() and x.numel() > 1 and _same(x, one.expand(x.shape)):
        return f"torch.ones({shape}, {rest}"
    numbers = _numbers(x.reshape(-1))
    if x.dim() and x.numel() > 3 and _same(x, x.reshape(-1)[0].expand(x.shape)):
        return f"torch.full(({shape}{',' if x.dim() == 1 else ''}), {numbers[0]}, {rest}"
    return f"torch.tensor({_nested(numbers, x.shape)}, {rest}"


def _numbers(x: Tensor) -> list[str]:
    """The shortest decimals that give a flat tensor's numbers back in its dtype."""
    exact = [code(v) for v in x.tolist()]
    if not x.is_floating_point() or x.dtype == torch.float64:
        return exact
    shortest, left = exact, set(range(x.numel()))
    for digits in range(1, 10):
        tried = [float(f"{v:.{digits}g}") for v in x.tolist()]
        kept = torch.tensor(tried, dtype=x.dtype) == x.cpu()
        for i in [i for i in left if kept[i]]:
            shortest[i] = code(tried[i])
            left.discard(i)
    return shortest


def _nested(numbers: list[str], shape: Iterable[int]) -> str:
    """Numbers in brackets as deep as a shape."""
    for length in reversed([*shape]):
        numbers = [f"[{', '.join(numbers[i : i + length])}]" for i in range(0, len(numbers), length)]
    return numbers[0]


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have the same numbers, and the same signs of their zeros."""
    if not torch.equal(x, y):
        return False
    return not x.is_floating_point() or torch.equal(torch.signbit(x), torch.signbit(y))


def _optimizer(value: GradientTransformation) -> str:
    text = getattr(type(value), "_code", None)
    if text is None:
        parts = [f"torchopt.{part}" for part in describe(value).split(" → ")]
        text = parts[0] if len(parts) == 1 else f"torchopt.chain({', '.join(parts)})"
        try:
            known = describe(transformation(text)) == describe(value)
        except Exception:  # what describe says of a schedule, or of another's optimizer, is no code
            known = False
        if not known:
            raise ParameterError(
                f"code: the optimizer «{describe(value)}» cannot be written as code; make it by transformation('…')."
            )
    return str(text)


def _fields(value: Any) -> str:
    """A dataclass's arguments: those without defaults by position, the others by keyword where they differ."""
    written: list[str] = []
    for f in sorted(dataclasses.fields(value), key=lambda f: f.kw_only is True):
        if not f.init or not f.repr:
            continue
        text = code(getattr(value, f.name))
        factory: Callable[[], Any] | Any = f.default_factory
        if f.default is dataclasses.MISSING and factory is dataclasses.MISSING:
            written.append(f"{f.name}={text}" if f.kw_only else text)
        elif text != code(f.default if factory is dataclasses.MISSING else factory()):
            written.append(f"{f.name}={text}")
    return ", ".join(written)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(code, values))
