"""A tape: the operations that a function of tensors came to, recorded as they ran.

Everything that torch computes passes its dispatcher, what autograd adds in a backward pass included. A tape notes each
operation below autograd, with numbers in place of tensors, so that the same arithmetic can be done again without Python,
autograd and its graph. What did not come in as an input and was not computed on the way is a constant: a tensor that the
function closes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Ref:
    """The number of a tensor of a tape; one object for each number, so that tapes can be compared."""

    __slots__ = ("number",)
    _made: list[Ref] = []  # ruff: ignore[mutable-class-default] - grows with the longest tape

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        """Write it as code does."""
        return f"v{self.number}"

    @classmethod
    def of(cls, number: int) -> Ref:
        """Return the one with a number."""
        while len(cls._made) <= number:
            cls._made.append(cls(len(cls._made)))
        return cls._made[number]


class Place(NamedTuple):
    """Where a tensor lies, and how: which memory, from which scalar on, of which kind."""

    storage: int
    offset: int
    kind: Kind


class Instruction(NamedTuple):
    """One operation: `results = operation(*args, **kwargs)`, refs in place of tensors."""

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: Any


@dataclass(frozen=True, eq=False)
class Tape:
    """What a function came to.

    Attributes:
        instructions: the operations in order.
        inputs: how many tensors came in; they have the first numbers.
        constants: the tensors closed over, by number.
        outputs: what went out; None where an output was None.
        tensors: the tensors themselves, by number, until their places are known.
        wants: the inputs' kinds, which another call's must have.
    """

    instructions: tuple[Instruction, ...]
    inputs: int
    constants: Mapping[int, Tensor]
    outputs: tuple[Ref | None, ...]
    tensors: Sequence[Tensor]
    wants: tuple[Kind, ...]

    def does_as(self, other: Tape) -> bool:
        """Say whether another recording came to the same operations on tensors of the same kinds."""
        return (
            self.wants == other.wants
            and self.outputs == other.outputs
            and len(self.instructions) == len(other.instructions)
            and self.constants.keys() == other.constants.keys()
            and all(map(same, self.instructions, other.instructions))
        )

    def places(self) -> list[Place]:
        """Return where each number's tensor lies."""
        keys: dict[int, int] = {}
        storages = [keys.setdefault(x.untyped_storage()._cdata, len(keys)) for x in self.tensors]
        return [Place(key, int(x.storage_offset()), kind(x)) for key, x in zip(storages, self.tensors, strict=True)]

    def closes_over(self, constants: Mapping[int, Tensor | None]) -> bool:
        """Say whether the tensors closed over are these very ones."""
        return all(x is constants[n] for n, x in self.constants.items())


LARGE = "its tensors are large"
"""Why nothing would be gained."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""The context in which torch computes, and neither builds a graph nor asks whether it should."""


class Kind(NamedTuple):
    """What must agree for a tensor to stand in for another."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def kind(x: Tensor) -> Kind:
    """Return a tensor's kind."""
    return Kind(x.shape, x.stride(), x.dtype, x.device)


class Recorder(TorchDispatchMode):
    """Records what runs inside.

    Args:
        inputs: the tensors that come in, each an object of its own.
        most: how many scalars all results may have together, past which nothing more is noted, and 2⁸ times those that they
            may have on average; None for any number.
    """

    def __init__(self, inputs: Sequence[Tensor], most: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.instructions: list[Instruction] = []
        self.constants: dict[int, Tensor] = {}
        self.why: str | None = None
        self._most = math.inf if most is None else most
        self._computed = 0
        self._alive: list[Tensor] = []  # by number: while they live, no other tensor has their id
        self._numbers: dict[int, Ref] = {}
        self._wants = tuple(kind(x) for x in inputs)
        for x in inputs:
            self._number(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        if self.why is not None:
            return func(*args, **(kwargs or {}))
        noted = tuple([self._encoded(x) for x in args])
        if kwargs:
            named = {k: self._encoded(x) for k, x in kwargs.items()}
            out = func(*args, **kwargs)
        else:
            named, out = {}, func(*args)
        results = self._result(func, out, any(isinstance(x, (Ref, list, tuple)) for x in noted))
        self.instructions.append(Instruction(func, noted, named, results))
        if self.why is not None:
            self._alive.clear()
            self.instructions.clear()
        return out

    def finish(self, outputs: Sequence[Tensor | None]) -> Tape | None:
        """Return the tape, or None where `why` says what prevents one."""
        if self.why is None and self._computed > len(self.instructions) * self._most / 2**8:
            self.why = LARGE
        if self.why is None and any(x is not None and id(x) not in self._numbers for x in outputs):
            self.why = "it returns what it did not compute"
        if self.why is not None:
            return None
        refs = tuple(None if x is None else self._numbers[id(x)] for x in outputs)
        return Tape(tuple(self.instructions), len(self._wants), self.constants, refs, self._alive, self._wants)

    def _number(self, x: Tensor) -> Ref:
        ref = Ref.of(len(self._alive))
        self._alive.append(x)
        self._numbers[id(x)] = ref
        return ref

    def _encoded(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            ref = self._numbers.get(id(value))
            if ref is None:
                ref = self._number(value)
                self.constants[ref.number] = value
                if type(value) not in (Tensor, torch.nn.Parameter):
                    self.why = f"a {type(value).__name__} takes part"
            return ref
        if isinstance(value, (list, tuple)):
            return type(value)([self._encoded(x) for x in value]) if type(value) in (list, tuple) else value
        return value

    def _result(self, func: Any, value: Any, noted: bool) -> Any:
        if isinstance(value, Tensor):
            ref = self._numbers.get(id(value))
            if ref is not None:  # it was written to
                return ref
            self._computed += value.numel()
            if self._computed > self._most:
                self.why = LARGE
            return self._number(value)
        if value is None:
            return None
        if isinstance(value, (list, tuple)):
            return tuple(self._result(func, x, noted) for x in value)
        if noted:
            self.why = f"{func} reads a value"
        return None


def record(
    function: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor], most: int | None
) -> tuple[Sequence[Tensor | None], Tape | None, str | None]:
    """Call a function and record what it comes to.

    Args:
        function: a function of the tensors; what it returns need not be all that the caller gets out of it.
        inputs: the tensors.
        most: how many scalars all results may have together; None for any number.

    Returns:
        What it returned, the tape, and where there is none the reason.
    """
    aliases = [x.detach() for x in inputs]
    recorder = Recorder(aliases, most)
    with recorder:
        outputs = function(*aliases)
    return outputs, recorder.finish(outputs), recorder.why


def same(a: Any, b: Any) -> bool:
    """Say whether two things that stand in instructions are equal and of the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    return a is b or bool(a == b)
