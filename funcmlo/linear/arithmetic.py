"""What an iterative solver's formulas are computed with: Python's numbers where values can be looked at, else tensors.

A solver is written once, for vectors that are lists of leaves and for scalars of either kind. Where values are known, on a
CPU with nothing traced or recorded, a scalar is a Python number, and no masked work is done. Everywhere else it is a 0-d
tensor, and no step depends on data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from funcmlo import _leaves, _tree
from funcmlo._tree import Tree

Vector: TypeAlias = list[Tensor]
"""A vector as its leaves."""

Scalar: TypeAlias = Any
"""A Python number or a 0-d tensor."""

Flag: TypeAlias = Any
"""A Python flag or a 0-d tensor; `&`, `|` and `^` join both kinds."""


@dataclass(frozen=True)
class Arithmetic:
    """Scalars about vectors, and vectors times scalars.

    Attributes:
        known: whether scalars are Python numbers.
        dtype: of scalars that are tensors.
    """

    known: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, *trees: Tree) -> Arithmetic:
        """Return what a solve computes with.

        Args:
            *trees: all tensors that go into it.

        Returns:
            Known scalars for vectors of one dtype whose values can be looked at, and only where grad mode is off: someone
            may differentiate what an operator closes over.
        """
        leaves, dtype = _tree.leaves(trees), _tree.precision(trees)
        one = all(x.dtype is dtype for x in leaves)  # torch refuses Python numbers beyond a lower precision's range
        return cls(one and not torch.is_grad_enabled() and _leaves.plain(leaves), dtype)

    @property
    def tiny(self) -> float:
        """The least number whose inverse is one."""
        return torch.finfo(self.dtype).tiny

    def fill(self, value: float, like: Scalar, dtype: torch.dtype | None = None) -> Scalar:
        """Return a number as a scalar, of another dtype if told so, in the place of another scalar."""
        return value if self.known else torch.full_like(like, value, dtype=dtype)

    def dot(self, a: Vector, b: Vector) -> Scalar:
        """Return ⟨a, b⟩."""
        product = _leaves.dot(a, b, self.dtype)
        return product.item() if self.known else product

    def norm(self, a: Vector) -> Scalar:
        """Return ‖a‖; no float32 entry under- or overflows."""
        length = _leaves.norm(a, self.dtype)
        return length.item() if self.known else length

    def ratio(self, a: Scalar, b: Scalar) -> Scalar:
        """Return a/b, also for b = 0, in the range of the dtype."""
        if not self.known:
            return a / b
        quotient = a / b if b else a * math.inf
        return math.copysign(math.inf, quotient) if abs(quotient) > torch.finfo(self.dtype).max else quotient

    def where(self, condition: Flag, a: Scalar, b: Scalar) -> Scalar:
        """Return the scalar a where a condition holds and b elsewhere."""
        return (a if condition else b) if self.known else torch.where(condition, a, b)

    def choose(self, condition: Flag, a: Vector, b: Vector) -> Vector:
        """Return the vector a where a condition holds and b elsewhere."""
        return (a if condition else b) if self.known else _tree.where(condition, a, b)

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        """Return the larger of two scalars, NaN where one is."""
        return (a if a >= b or a != a else b) if self.known else torch.maximum(a, b)

    def smaller(self, a: Scalar, b: Scalar) -> Scalar:
        """Return the smaller of two scalars, NaN where one is."""
        return (a if a <= b or a != a else b) if self.known else torch.minimum(a, b)

    def taken(self, value: float | Tensor) -> Scalar:
        """Return a number from elsewhere as a scalar."""
        return float(value) if self.known else value

    def scale(self, factor: Scalar, a: Vector) -> Vector:
        """Return factor · a, in place of a where values are known and nobody else holds it."""
        if not self.known:
            return list(_tree.scale(factor, a))
        out = a if _leaves.unshared(a) else [None] * len(a)
        return [torch.mul(x, factor, out=o) for x, o in zip(a, out, strict=True)]

    def add_scaled(self, a: Vector, factor: Scalar, b: Vector, *, into: Vector) -> Vector:
        """Return a + factor · b, in place of a vector that is done with where values are known and nobody else holds it."""
        if not self.known:
            return list(_tree.add_scaled(a, factor, b))
        out = into if _leaves.unshared(into) else [None] * len(a)
        return [torch.add(x, y, alpha=factor, out=o) for x, y, o in zip(a, b, out, strict=True)]

    def over(self, active: Flag) -> bool:
        """Say whether there is known to be nothing left to do: asking waits for a GPU, and traced values do not say."""
        return not active if self.known else _leaves.plain((active,)) and not bool(active)

    def told(self, value: Scalar) -> Tensor:
        """Return a scalar or a flag as a 0-d tensor, for the statistics."""
        return torch.tensor(value, dtype=self.dtype if isinstance(value, float) else None) if self.known else value
