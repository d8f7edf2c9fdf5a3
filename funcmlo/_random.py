"""Seeds: a cost is a deterministic function of (parameters, batch, seed of the step).

Every evaluation that belongs to one step (its gradient, Hessian-vector products, perturbed evaluations, replays) runs
under the step's own seed, so all of them draw the same numbers; the generators are then put back as they were. The
state is saved and restored by hand because `torch.random.fork_rng` costs about forty times as much.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from funcmlo.errors import ParameterError


def step_seed(seed: int, level: str, step: int) -> int:
    """Return the seed of a level's step, the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/{level}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def checked_seed(owner: str, seed: Any) -> int:
    """Return a seed as an integer.

    Args:
        owner: who takes it, for the message.
        seed: what the user gave.

    Returns:
        The integer.

    Raises:
        ParameterError: it is none.
    """
    try:
        return operator.index(seed)
    except TypeError:
        raise ParameterError(f"{owner}: seed={seed!r}; expected an integer.") from None


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Run a block under a seed and put every default generator back afterwards."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        generators.extend(torch.cuda.default_generators)
    saved = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, saved, strict=True):
            generator.set_state(state)
