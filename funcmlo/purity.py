"""Purity, held: what a state holds is not written to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

from funcmlo import _diff, _tree
from funcmlo.errors import LossError, listing
from funcmlo.state import State


@contextmanager
def untouched(state: State) -> Generator[None]:
    """Run a block and raise if it wrote to a tensor of the state, as told by the version counters.

    Args:
        state: the state that the block reads.

    Yields:
        Nothing.

    Raises:
        LossError: a loss, an `init` or a projection changed parameters in place.
    """
    if _diff.transforming():
        yield
        return
    before = _versions(state)
    yield  # ruff: ignore[fallible-context-manager] - an error of the block's own comes first
    changed = [name for name, versions in _versions(state).items() if versions != before[name]]
    if changed:
        raise LossError(
            f"the parameters of level {listing(map(repr, changed))} were changed in place, by a loss, an init or a "
            "projection; compute a new tensor (x.clamp(0, 1) in place of x.clamp_(0, 1)). The state that came in now holds "
            "the changed numbers."
        )


def _versions(state: State) -> dict[str, list[int]]:
    return {
        name: [leaf._version for leaf in _tree.leaves(tree) if isinstance(leaf, Tensor)]
        for name, tree in state.params.items()
    }
