"""Seeds: what is drawn, and that the generators are left alone."""

from __future__ import annotations

import pytest
import torch

import funcmlo as fm
from funcmlo import _random
from tests.programs import SGD, start, upper


def test_seeds_are_the_same_on_every_machine() -> None:  # hash() differs from process to process
    assert _random.step_seed(0, "y", 0) == 1298762631271645808
    assert _random.step_seed(3, "weights", 17) == 4501333683748237978


def test_two_levels_of_one_step_draw_different_numbers() -> None:
    drawn: dict[str, list[torch.Tensor]] = {"y": [], "x": []}

    def noise(level: str) -> torch.Tensor:
        drawn[level].append(torch.rand(4, dtype=torch.float64))
        return drawn[level][-1]

    p = fm.Multilevel(
        fm.Level("y", lambda y, x: (noise("y") * (y - x) ** 2).sum(), SGD, response=fm.ITD()),
        fm.Level("x", lambda x, y: (noise("x") * y).sum(), SGD),
    )
    p.step(p.init(start()), {})
    assert not torch.equal(drawn["y"][0], drawn["x"][0])


def test_a_loss_that_raises_leaves_the_generator_as_it_was() -> None:
    def bad(y, x):
        raise KeyError("mine")

    p = fm.Multilevel(fm.Level("y", bad, SGD), fm.Level("x", upper, SGD))
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError, match="mine"):
        p.step(p.init(start()), {})
    assert torch.equal(torch.random.get_rng_state(), before)
