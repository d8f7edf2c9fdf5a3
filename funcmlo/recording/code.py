"""A divided tape written out as Python: straight code of torch's functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcmlo.recording.replay import Parts, given_by, taken_by
from funcmlo.recording.tape import Instruction, Kind, Ref

Make = Callable[[Sequence[Tensor]], tuple[Callable[..., Any], Callable[..., Any]]]
"""make(outside) → (forward, backward): forward(*varying) → (results, kept); backward(kept, *cotangents) → products."""

_NAMES = (
    "abs add addmm addmv bmm clamp_min cos div dot exp expm1 log log1p maximum minimum mm mul mv neg reciprocal relu rsqrt "
    "sigmoid sin sqrt square sub sum t tanh where"
)
_DIRECT = frozenset(re.findall(r"\w+", _NAMES))
"""Operations whose function in `torch` takes the same words; it is called at two thirds of the overload's cost."""

_WITH_NUMBER = {"add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"}
"""Elementwise operations that turn a number into a tensor at every call."""


def code(parts: Parts, varying: int, cotangents: Sequence[int], kinds: Sequence[Kind]) -> tuple[Make, str]:
    """Write a tape's parts out as a function that makes functions.

    Args:
        parts: the parts.
        varying: how many inputs vary.
        cotangents: the numbers of the cotangents.
        kinds: every number's kind.

    Returns:
        The function, and its text for whoever wants to read it.
    """
    writer = _Writer(kinds)
    stay = {*parts.kept, *_numbers(parts.results)}
    lines = ["def make(outside):"]
    lines += [f"    {_tuple(parts.outside)} = outside"] if parts.outside else []
    lines += writer.lines(parts.once, None, "    ")
    lines += [f"    def forward({', '.join(f'v{n}' for n in range(varying))}):"]
    lines += writer.lines(parts.forward, stay, "        ")
    lines += [f"        return {_tuple_of(parts.results)}, {_tuple(parts.kept)}"]
    lines += [f"    def backward({', '.join(['kept', *(f'v{n}' for n in cotangents)])}):"]
    lines += [f"        {_tuple(parts.kept)} = kept"] if parts.kept else []
    lines += writer.lines(parts.backward, set(_numbers(parts.products)), "        ")
    lines += [f"        return {_tuple_of(parts.products)}", "    return forward, backward"]
    text = "\n".join(lines)
    exec(compile(text, "<replay>", "exec"), writer.names)  # it is made of numbers of tensors and of operations alone
    return writer.names["make"], text


class _Writer:
    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.names: dict[str, Any] = {}
        self._kinds = kinds

    def lines(self, instructions: Sequence[Instruction], stay: set[int] | None, indent: str) -> list[str]:
        """The lines of a part; what is used no more is let go, unless it stays."""
        last: dict[int, int] = {}
        for i, one in enumerate(instructions):
            last.update((n, i) for n in (*given_by(one), *taken_by(one)))
        made, lines = set[int](), list[str]()
        for i, one in enumerate(instructions):
            taken, given = taken_by(one), given_by(one)
            lines.append(indent + _target(one.results, {*made, *taken}) + self._call(one))
            made.update(given)
            if stay is not None:
                gone = sorted(n for n in {*taken, *given} if last[n] == i and n in made and n not in stay)
                lines += [f"{indent}del {', '.join(f'v{n}' for n in gone)}"] if gone else []
        return lines

    def _call(self, one: Instruction) -> str:
        args = list(one.args)
        name, _, overload = str(one.operation).removeprefix("aten.").partition(".")
        plain = isinstance(one.results, Ref)
        if f"{name}.{overload}" in _WITH_NUMBER and plain and _is_number(args[1]) and isinstance(args[0], Ref):
            own, result = self._kinds[args[0].number], self._kinds[one.results.number]
            if own.dtype == result.dtype and own.dtype.is_floating_point and own.device.type == "cpu":
                args[1] = torch.tensor(args[1], dtype=own.dtype)
        direct = plain and name in _DIRECT and overload in ("default", "Tensor", "self") and _is_aten(one.operation)
        function = getattr(torch, name) if direct else getattr(one.operation, "_op", one.operation)
        words = [self._word(x) for x in args] + [f"{k}={self._word(x)}" for k, x in one.kwargs.items()]
        return f"{self._named('f', function)}({', '.join(words)})"

    def _word(self, value: Any) -> str:
        if isinstance(value, Ref):
            return f"v{value.number}"
        if type(value) is list or type(value) is tuple:
            inside = ", ".join(map(self._word, value))
            return f"[{inside}]" if type(value) is list else f"({inside}{',' * bool(value)})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return self._named("k", value)

    def _named(self, kind: str, value: Any) -> str:
        name = f"{kind}{len(self.names)}"
        self.names[name] = value
        return name


def _is_aten(operation: Any) -> bool:
    return bool(operation.namespace == "aten")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _target(results: Any, known: Iterable[int]) -> str:
    """The left-hand side of an assignment; what is only written to keeps its name."""
    if isinstance(results, Ref):
        return "" if results.number in known else f"v{results.number} = "
    if isinstance(results, tuple) and any(isinstance(x, Ref) for x in results):
        return f"{', '.join(f'v{x.number}' if isinstance(x, Ref) else '_' for x in results)}, = "
    return ""


def _tuple(numbers: Sequence[int]) -> str:
    return f"({''.join(f'v{n}, ' for n in numbers)})"


def _tuple_of(results: Sequence[Ref | None]) -> str:
    return f"({''.join('None, ' if ref is None else f'{ref}, ' for ref in results)})"


def _numbers(results: Sequence[Ref | None]) -> list[int]:
    return [ref.number for ref in results if ref is not None]
