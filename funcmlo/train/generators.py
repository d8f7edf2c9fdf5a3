"""The generators of random numbers that data are drawn with: put under a seed, and back as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from funcmlo._random import seeded
from funcmlo.train.numpy_default import seed_numpy


@contextmanager
def drawing(seed: int, held: Iterable[Any] = ()) -> Generator[None]:
    """Run a block with torch's, Python's and numpy's default generators under a seed, and put them back afterwards.

    Args:
        seed: the seed.
        held: further generators, which are seeded and put back too.

    Yields:
        Nothing.
    """
    numpy = sys.modules.get("numpy")
    undo: list[Callable[[], Any]] = []
    with seeded(seed):
        try:
            undo.append(partial(random.setstate, random.getstate()))
            random.seed(seed)
            if numpy is not None:
                undo.append(seed_numpy(numpy, seed))
            for generator in held:
                undo.append(_seed(generator, seed))
            yield
        finally:
            for put_back in reversed(undo):
                put_back()


def generators(*owners: Any) -> tuple[Any, ...]:
    """Return the generators that objects hold as attributes, and those of the samplers and datasets that they hold.

    Args:
        *owners: samplers, datasets, functions; or a generator itself.

    Returns:
        Each of them once: torch's, Python's and numpy's.

    Example:
        >>> mine = torch.Generator()
        >>> sampler = torch.utils.data.RandomSampler(range(9), generator=mine)
        >>> generators(torch.utils.data.BatchSampler(sampler, 3, drop_last=False)) == (mine,)
        True
    """
    found, seen, ahead = list[Any](), set[int](), [*owners]
    while ahead:
        x = ahead.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if _is_generator(x):
            found.append(x)
        else:
            values = [part for value in getattr(x, "__dict__", {}).values() for part in _parts(value)]
            ahead += [part for part in values if _is_generator(part) or isinstance(part, (Sampler, Dataset))]
    return tuple(found)


def _parts(value: Any) -> Iterable[Any]:
    """What an attribute holds: itself, or several samplers or datasets; a long list of indices is not looked through."""
    several = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return several if isinstance(next(iter(several), None), (Sampler, Dataset)) else (value,)


def _is_generator(x: Any) -> bool:
    if isinstance(x, (torch.Generator, random.Random)):
        return not isinstance(x, random.SystemRandom)  # whose numbers follow from no seed
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, (numpy.random.Generator, numpy.random.RandomState))


def _seed(generator: Any, seed: int) -> Callable[[], Any]:
    """Seed a generator; return what puts it back."""
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        generator.manual_seed(seed)
        return partial(generator.set_state, state)
    if isinstance(generator, random.Random):
        before = generator.getstate()
        generator.seed(seed)
        return partial(generator.setstate, before)
    if hasattr(generator, "bit_generator"):  # numpy's
        bits = generator.bit_generator
        undo = partial(setattr, bits, "state", bits.state)
        bits.state = type(bits)(seed).state
        return undo
    undo = partial(generator.set_state, generator.get_state(legacy=False))  # numpy's older kind
    generator.seed(seed % 2**32)
    return undo
