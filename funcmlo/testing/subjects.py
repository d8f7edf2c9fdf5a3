"""What an oracle looks at: a plain function, a program's level or a solution map, each as a scalar function of a tree."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from funcmlo import _tree
from funcmlo._argmin import Argmin
from funcmlo._fixed_point import FixedPoint
from funcmlo._tree import Tree
from funcmlo.errors import EstimatorError, LossError, NonFiniteError, ParameterError, listing
from funcmlo.multilevel import Multilevel
from funcmlo.operands import named
from funcmlo.state import State


@dataclass(frozen=True)
class Subject:
    """A scalar function of a tree, in float64.

    Attributes:
        name: what it is called in messages.
        point: where it is looked at.
        function: the function.
        library: the library's own gradient at the point.
        sign: −1 where a hypergradient is that of the function's negative (a level with `maximize=True`).
    """

    name: str
    point: Tree
    function: Callable[[Tree], Tensor]
    library: Callable[[], Tree]
    sign: float = 1.0

    def __call__(self, x: Tree) -> float:
        """Return the function's value, NaN where it is not defined."""
        with torch.no_grad(), told(self.name):
            try:
                value = self.function(x)
            except (NonFiniteError, LinAlgError):
                return float("nan")
        check_scalar(self.name, value)
        return float(value)


def subject(
    thing: Any, *arguments: Any, of: str | None = None, batch: Any = None, cotangent: Tree = None, **others: Tree
) -> Subject:
    """Make one thing of the three ways to call an oracle.

    Args:
        thing: a function of a tree, a program, or what `argmin` or `fixed_point` returned.
        *arguments: the tree; or state and batches; or the start and the inputs.
        of: a program's level.
        batch: a solution map's batch.
        cotangent: a tree like the solution; None for ones.
        **others: inputs of a solution map by name.

    Returns:
        The function with its point.

    Raises:
        ParameterError: something is missing, or too much.
    """
    if isinstance(thing, Multilevel):
        _only(thing, ("state", "batches"), arguments, of=of, batch=batch, cotangent=cotangent, **others)
        state, batches = arguments
        return _of_program(thing, state, batches, of)
    if isinstance(thing, (Argmin, FixedPoint)):
        if not arguments or of is not None:
            raise ParameterError("an oracle on a solution map takes (solve, init, *inputs, batch=…, cotangent=…).")
        return _of_solve(thing, arguments[0], arguments[1:], batch, cotangent, others)
    if not callable(thing):
        raise ParameterError(
            f"an oracle takes a function, a Multilevel, or what fm.argmin returns; {type(thing).__name__} came."
        )
    _only(thing, ("x",), arguments, of=of, batch=batch, cotangent=cotangent, **others)
    point = wide(arguments[0])
    check_tree("x", point)
    return Subject(getattr(thing, "__name__", "the function"), point, thing, lambda: func_grad(thing, point))


def is_plain(thing: Any) -> bool:
    """Say whether something is a plain function, and neither a program nor a solution map."""
    return not isinstance(thing, (Multilevel, Argmin, FixedPoint))


def wide(tree: Tree, dtype: torch.dtype = torch.float64) -> Tree:
    """Return a tree with its floating-point tensors cut from any graph and raised to float64.

    Args:
        tree: leaves may be anything; a function (a batch by its step) is wrapped, so that its values are raised.
        dtype: what to raise to.

    Returns:
        A tree of the same structure.
    """
    if callable(tree) and not isinstance(tree, Tensor):
        return lambda *given: wide(tree(*given), dtype)
    return _tree.map_tensors(lambda x: x.detach().to(dtype) if x.is_floating_point() else x, tree)


def wide_state(state: Any, batches: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Return a state and its batches raised to float64; what is none of them is left to the program's own checks."""
    batches = (
        {name: wide(b, dtype) if not isinstance(b, Iterator) else b for name, b in batches.items()}
        if isinstance(batches, Mapping)
        else batches
    )
    return (wide(state, dtype) if isinstance(state, State) else state), batches


def func_grad(function: Callable[[Tree], Tensor], x: Tree) -> Tree:
    """Return the gradient that torch.func.grad gives, of a tree that only this package's pytrees may know."""
    leaves, structure = _tree.flatten(x)
    with told("the function"):
        gradient = torch.func.grad(lambda flat: function(_tree.unflatten(structure, flat)))(leaves)
    return _tree.unflatten(structure, gradient)


def inputs_of(solve: Argmin | FixedPoint, inputs: tuple[Tree, ...], by_name: dict[str, Tree]) -> tuple[Any, Any]:
    """Return a solution map's inputs by name: those that can be differentiated by, and all."""
    names = solve.inputs if isinstance(solve, Argmin) else solve.map.levels
    x = {name: wide(tree) for name, tree in named(type(solve).__name__, names, inputs, by_name).items()}
    vectors = {n: tree for n, tree in x.items() if all(_floating(leaf) for leaf in _tree.leaves(tree))}
    return vectors, x


def _of_program(program: Multilevel, state: Any, batches: Any, of: str | None) -> Subject:
    if of is None:
        raise ParameterError(f"which level? Say of=…; levels: {listing(program.graph.levels)}.")
    program.graph.check(of)
    state, batches = wide_state(state, batches)

    def cost(own: Tree) -> Tensor:
        return program.cost(replace(state, params={**state.params, of: own}), batches, of=of)

    def library() -> Tree:
        with told(f"level '{of}'"):
            return program.hypergradient(state, batches, of=of)

    sign = -1.0 if next(level for level in program.levels if level.name == of).maximize else 1.0
    point = state.params[of] if isinstance(state, State) and of in state.params else None
    return Subject(f"level '{of}'", point, cost, library, sign)


def _of_solve(
    solve: Argmin | FixedPoint, init: Tree, inputs: tuple[Tree, ...], batch: Any, cotangent: Tree, by_name: dict[str, Tree]
) -> Subject:
    init, batch = wide(init), wide(batch)
    x, everything = inputs_of(solve, inputs, by_name)
    v = cotangent_like(init, cotangent)

    def value(at: dict[str, Tree]) -> Tensor:
        return _tree.dot(v, solve(init, batch=batch, **{**everything, **at}))

    return Subject(type(solve).__name__.lower(), x, value, lambda: func_grad(value, x))


def cotangent_like(init: Tree, cotangent: Tree) -> Tree:
    """Return a cotangent in float64, ones without one.

    Args:
        init: a tree like the solution.
        cotangent: what came.

    Returns:
        The cotangent.

    Raises:
        ParameterError: it is unlike the solution.
    """
    v = _tree.map(torch.ones_like, init) if cotangent is None else wide(cotangent)
    if difference := _tree.mismatch(init, v):
        raise ParameterError(f"the cotangent and the solution differ: {difference}.")
    return v


def direction_like(name: str, point: Tree, direction: Tree) -> Tree:
    """Return a tree that must be like the point, in float64, or say how it differs."""
    direction = wide(direction)
    if difference := _tree.mismatch(point, direction):
        raise ParameterError(f"{name} and the point differ: {difference}.")
    return direction


@contextmanager
def told(name: str) -> Generator[None]:
    """Run a block and say what to do where it fails because its tensors are float64 now."""
    try:
        yield
    except (RuntimeError, ParameterError, LossError) as error:
        if not any(word in str(error) for word in _DTYPE_WORDS):
            raise
        raise EstimatorError(
            f"{name} failed on float64 numbers ({str(error).splitlines()[0]}): oracles raise parameters, states and "
            "batches to float64, and it mixes them with float32 data of its own. Hand that data in (as a batch or an "
            "input), or make it follow its argument, data.to(x.dtype)."
        ) from error


_DTYPE_WORDS = ("dtype", "Double", "double and float", "float != double", "double != float")


def check_scalar(name: str, value: Any) -> None:
    """Raise unless a value is a 0-d tensor of real floating-point numbers."""
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        came = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"{name} returned {came}; expected a real 0-d tensor: reduce it with .mean() or .sum().")


def check_tree(name: str, tree: Tree) -> None:
    """Raise unless a tree's leaves are floating-point tensors."""
    for path, leaf in _tree.named_leaves(tree):
        if not _floating(leaf):
            came = f"a tensor of dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ParameterError(f"{name}{path} is {came}; expected a tree of floating-point tensors.")


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _only(thing: Any, expected: tuple[str, ...], arguments: tuple[Any, ...], **keywords: Any) -> None:
    """Raise unless the arguments are those that this way of calling takes."""
    taken = {"of"} if isinstance(thing, Multilevel) else set()
    extra = [name for name, value in keywords.items() if value is not None and name not in taken]
    if len(arguments) != len(expected) or extra:
        kind = "a program" if isinstance(thing, Multilevel) else "a function"
        came = f"{len(arguments)} arguments" + (f" and {listing(extra)}=" if extra else "")
        raise ParameterError(f"an oracle on {kind} takes it and {listing(expected)}{', of=' if taken else ''}; {came} came.")
