"""Purity, held: what comes in is not written to."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from funcmlo import _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import LossError, listing


@contextmanager
def untouched(
    trees: Mapping[str, Tree], remedy: str = "The state that came in now holds the changed numbers."
) -> Generator[None]:
    """Run a block and raise if it wrote to a tensor of some trees, as told by the version counters.

    Args:
        trees: what the block reads, by the name that a message calls it.
        remedy: the message's last sentence.

    Yields:
        Nothing.

    Raises:
        LossError: a function of the user's changed something in place.
    """
    if _tracing.unreadable() or torch.is_inference_mode_enabled():
        yield
        return
    before = _versions(trees)
    yield  # ruff: ignore[fallible-context-manager] - an error of the block's own comes first
    changed = [name for name, versions in _versions(trees).items() if versions != before[name]]
    if changed:
        raise LossError(
            f"{listing(changed)} changed in place, by a loss, a map, an init, a solver or a projection; compute a new "
            f"tensor (x.clamp(0, 1) in place of x.clamp_(0, 1)). {remedy}"
        )


def unchanged(state: Any, batches: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Run a block and raise if it wrote to what came in.

    Args:
        state: a program's state.
        batches: its batches by level name; iterators and functions make theirs as they go.

    Returns:
        The context.
    """
    watched = {f"the parameters of level '{name}' were": tree for name, tree in state.params.items()}
    watched |= {f"the buffers of level '{name}' were": tree for name, tree in state.buffers.items()}
    fixed = {name: batch for name, batch in batches.items() if not (callable(batch) or isinstance(batch, Iterator))}
    watched |= {f"the batch of level '{name}' was": batch for name, batch in fixed.items()}
    return untouched(watched, "The numbers that came in are changed now.")


def _versions(trees: Mapping[str, Tree]) -> dict[str, list[int]]:
    return {
        name: [leaf._version for leaf in _tree.leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        for name, tree in trees.items()
    }
