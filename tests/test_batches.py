"""Batches: which one is asked for, and how long it is kept."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import funcmlo as fm
from tests.programs import BATCHES, SGD, lower, program, start


def test_a_level_without_inner_steps_takes_the_next_batch_of_an_iterator() -> None:
    state, _ = program().step(program().init(start()), {"y": BATCHES.__getitem__})
    stream = iter(BATCHES)
    program(steps=0).step(state, {"y": stream})
    assert next(stream) is BATCHES[1]


@pytest.mark.parametrize("response", [fm.AID(fm.CG(5)), fm.FiniteDifference()], ids=repr)
def test_batches_that_are_over_are_let_go(response: fm.BestResponse) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream():
        nonlocal most
        for batch in BATCHES:
            copy = batch.clone()
            alive.append(weakref.ref(copy))
            yield copy
            del copy
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))

    p = program(response, steps=8)
    p.step(p.init(start()), {"y": stream()})
    assert len(alive) == 8
    assert most <= 2


def test_the_upper_level_asks_for_the_batch_of_its_own_step() -> None:
    asked: list[int] = []
    p = fm.Multilevel(
        fm.Level("y", lower, SGD, steps=3, response=fm.AID(fm.CG(5))),
        fm.Level("x", lambda x, y, batch: (y * batch).sum(), SGD),
    )
    state = p.init(start())
    for _ in range(2):
        state, _ = p.step(state, {"y": BATCHES[0], "x": lambda t: asked.append(t) or BATCHES[t]})
    assert asked == [0, 1]
