"""Which inputs reverse passes reach: a hypergradient that is zero because a graph is cut is told from one that is zero."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree


@dataclass
class Reached:
    """Which of some inputs plain autograd's reverse passes reached.

    Attributes:
        inputs: the inputs by name; a pass is recognized by this very object among its arguments.
        told: whether there was such a pass at all (under a torch.func transform none can tell).
        names: the inputs that a graph led back to.
    """

    inputs: dict[str, Tree]
    told: bool = False
    names: set[str] = field(default_factory=set)

    def missed(self) -> list[str]:
        """Return the inputs that have entries and that no pass reached."""
        return [name for name, x in self.inputs.items() if self.told and name not in self.names and _tree.leaves(x)]


_listening: ContextVar[Reached | None] = ContextVar("listening", default=None)


@contextmanager
def reaching(inputs: dict[str, Tree]) -> Generator[Reached]:
    """Run a block and listen to which inputs its reverse passes reach.

    Args:
        inputs: the inputs by name, the object that the passes have among their arguments.

    Yields:
        What is known so far.
    """
    reached = Reached(inputs)
    token = _listening.set(reached)
    try:
        yield reached
    finally:
        _listening.reset(token)


def tell(argument: Tree, grads: Sequence[Tensor | None]) -> None:
    """Let who listens know where a pass arrived.

    Args:
        argument: one of the pass's arguments.
        grads: what autograd returned for its leaves; None where no graph leads there.
    """
    reached = _listening.get()
    if reached is None or argument is not reached.inputs:
        return
    reached.told = True
    arrived = _tree.unflatten(_tree.structure(argument), [g is not None for g in grads])
    reached.names |= {name for name, leaves in arrived.items() if any(_tree.leaves(leaves))}
