"""numpy's default generator, lent to data and put back as it was, in a few microseconds.

To read its state and set it again costs 0.1 ms, too much for each batch. So another bit generator takes the place of its
own for a while. That would lose one number: a normal variate that was drawn together with the last one and waits for the
next call, which only the whole state tells. The state is therefore read whenever the bit generator's words are not those
that were seen last without such a number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

_WORDS = 624 * 4 + 4
"""Bytes of the Mersenne twister's state: 624 words and a position."""


class _Lender:
    """Puts a generator under a seed and its own bit generator back.

    Args:
        random: the module `numpy.random`.
    """

    def __init__(self, random: Any) -> None:
        self.random = random
        self.twister = random.MT19937
        self.lent = random.MT19937() if hasattr(random, "set_bit_generator") else None  # as of numpy 1.24
        self.without_waiting = b""

    def seed(self, seed: int) -> Callable[[], Any]:
        """Seed the default generator; return what puts it back."""
        random = self.random
        bits = None if self.lent is None else random.get_bit_generator()
        if type(bits) is not self.twister or bits is self.lent:  # one that the user has set, or a block inside a block
            undo = partial(random.set_state, random.get_state(legacy=False))
        else:
            undo = partial(self._give_back, bits, self._with_waiting(bits))
            random.set_bit_generator(self.lent)
        random.seed(seed % 2**32)
        return undo

    def _with_waiting(self, bits: Any) -> Any:
        """The whole state where a number waits, else None."""
        words = ctypes.string_at(bits.ctypes.state_address, _WORDS)
        if words == self.without_waiting:
            return None
        state = self.random.get_state(legacy=False)
        self.without_waiting = b"" if state["has_gauss"] else words
        return state if state["has_gauss"] else None

    def _give_back(self, bits: Any, state: Any) -> None:
        self.random.set_bit_generator(bits)
        if state is not None:
            self.random.set_state(state)


@cache
def _lender(random: Any) -> _Lender:
    return _Lender(random)


def seed_numpy(numpy: Any, seed: int) -> Callable[[], Any]:
    """Seed numpy's default generator.

    Args:
        numpy: the module.
        seed: the seed.

    Returns:
        What puts the generator back.

    Example:
        >>> import numpy
        >>> expected = numpy.random.RandomState(3).randn()
        >>> put_back = seed_numpy(numpy, 3)
        >>> bool(numpy.random.randn() == expected)
        True
        >>> put_back()
    """
    return _lender(numpy.random).seed(seed)
