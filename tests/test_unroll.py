"""Inner loops: what they draw, where they begin, how they are replayed."""

from __future__ import annotations

import pytest
import torch
import torchopt

import funcmlo as fm
from tests.oracles import bits
from tests.programs import BATCHES, SGD, Spy, program, start


def test_every_inner_step_draws_its_own_numbers() -> None:  # one seed for all steps of a call
    drawn = []

    def noisy(y, x):
        drawn.append(torch.rand(4, dtype=torch.float64))
        return (drawn[-1] * (y - x) ** 2).sum()

    p = fm.Multilevel(
        fm.Level("y", noisy, SGD, steps=3, response=fm.FiniteDifference()),
        fm.Level("x", lambda x, y: y.sum(), SGD),
    )
    state, _ = p.step(p.init(start()), {})
    assert len({tuple(bits(numbers)) for numbers in drawn[:3]}) == 3
    # The two perturbed evaluations, one per input and direction, draw the last inner step's numbers again.
    assert all(torch.equal(numbers, drawn[2]) for numbers in drawn[3:])
    # The next call goes on with new ones.
    first = len(drawn)
    p.step(state, {})
    assert len({tuple(bits(numbers)) for numbers in (*drawn[:3], *drawn[first : first + 3])}) == 6


def test_a_loop_that_starts_elsewhere_says_where() -> None:
    seen = []

    class Spy(fm.ITD):
        def vjp(self, solved, cotangent, state):
            seen.append(solved)
            return super().vjp(solved, cotangent, state)

    momentum = torchopt.sgd(0.1, momentum=0.9)
    p = program(Spy(), momentum, init=lambda x: 2 * x)
    state, _ = p.step(p.init(start()), {"y": BATCHES[0]})
    x = state.params["x"]
    p.step(state, {"y": BATCHES[0]})
    begun = seen[-1]
    assert bits(begun.init[0]) == bits(2 * x)
    assert bits(begun.init) == bits(begun.trajectory.states[0])
    assert bits(begun.init[1]) == bits(begun.optimizer.init(2 * x))
    assert bits(begun.start({"x": x + 1})) == bits((2 * (x + 1), begun.init[1]))


def test_a_level_that_made_no_step_is_bound_to_its_first_batch() -> None:
    asked = []
    p = program()
    p.hypergradient(p.init(start()), {"y": lambda t: asked.append(t) or BATCHES[0]}, of="x", solve=False)
    assert set(asked) == {0}


def test_a_replayed_step_is_a_function_of_the_inputs() -> None:
    spy = Spy()
    p = program(spy, torchopt.sgd(0.1, momentum=0.9))
    state = p.init(start())
    p.step(state, {"y": BATCHES.__getitem__})
    (at,) = spy.seen
    y, s = at.start(at.inputs)
    moved, _ = at.update(y, s, {"x": at.inputs["x"] + 1}, 0)
    # The first step of momentum is the gradient's: y − 0.1 (y − (x + 1) + batch).
    assert torch.allclose(moved, y - 0.1 * (y - at.inputs["x"] - 1 + BATCHES[0]), rtol=1e-14)
    assert bits(at.optimizer.init(y)) == bits(s)


def test_without_solving_a_level_with_a_start_stays_where_it_is() -> None:
    p, params = program(init=lambda x: torch.zeros_like(x)), start()
    answer = p.hypergradient(p.init(params), {"y": BATCHES[0]}, of="x", solve=False)
    assert torch.allclose(answer, torch.cos(params["y"]) + 0.2 * params["x"], rtol=1e-12)


def test_a_cost_of_one_element_is_no_scalar() -> None:
    p = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(0, keepdim=True), SGD))
    with pytest.raises(fm.LossError, match=r"a tensor of shape \(1,\); expected a scalar"):
        p.step(p.init({"y": torch.ones(2)}), {})
