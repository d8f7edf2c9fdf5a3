"""Chunks of tasks chosen by measurement: the clock is planted, and nothing but time follows from the choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tracing, chunks, together

N = 20
META = torch.tensor([0.6, -0.4, 0.9], dtype=torch.float64)
GOALS = torch.rand(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
ITD = fm.ITD()


class Clock:
    """Time that passes where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(chunks, "_clock", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


COSTS: dict[str, tuple[dict[int, float], int]] = {
    "all at once": ({1: 9.0, 2: 5.0, 8: 3.0, 32: 2.0}, 32),
    "one by one": ({1: 1.0, 2: 5.0, 8: 3.0, 32: 2.0}, 1),
    "the smaller one of equals": ({1: 9.0, 2: 5.0, 8: 2.0, 32: 2.0}, 8),
    "the smaller one within a few per cent": ({1: 9.0, 2: 2.08, 8: 2.04, 32: 2.0}, 2),
    "not beyond": ({1: 9.0, 2: 2.12, 8: 2.11, 32: 2.0}, 32),
    "what fails loses": ({1: 9.0, 2: 5.0}, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_the_fastest_is_taken(name: str, clock: Clock) -> None:
    costs, expected = COSTS[name]
    tried: list[int] = []

    def attempt(size: int) -> None:
        tried.append(size)
        clock.now += costs[size]  # a KeyError for what fails

    measured = chunks.Measured("y")
    assert measured.latest is None
    assert measured.choose("sizes", 32, attempt, CPU) == measured.latest == expected
    once = len(tried)
    assert tried[:5] == [1, 1, 2, 8, 32]
    assert [tried.count(size) for size in (2, 8, 32)] == [3 if size in costs else 1 for size in (2, 8, 32)]
    assert measured.choose("sizes", 32, attempt, CPU) == expected
    assert len(tried) == once  # kept
    costs = dict.fromkeys((1, 2, 8, 32), 1.0)
    assert measured.choose("other sizes", 32, attempt, CPU) == measured.latest == 1
    assert measured.choose("sizes", 32, attempt, CPU) == measured.latest == expected


def test_the_first_evaluation_and_a_disturbance_do_not_count(clock: Clock) -> None:
    calls: dict[int, int] = {}

    def attempt(size: int) -> None:
        calls[size] = calls.get(size, 0) + 1
        clock.now += 100.0 if calls[size] == 1 else {1: 2.0, 4: 1.0}[size]

    assert chunks.Measured("y").choose((), 4, attempt, CPU) == 4
    assert chunks.candidates(1) == [1]
    assert chunks.candidates(2) == [1, 2]


def test_what_fails_one_by_one_fails() -> None:
    def attempt(size: int) -> None:
        raise fm.LossError("no scalar")

    with pytest.raises(fm.LossError, match="no scalar"):
        chunks.Measured("y").choose((), 4, attempt, CPU)


def cost(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    return ((y - x * batch) ** 2 / 2 + y**4 / 40).sum()


def program(
    chunk: Any, response: fm.BestResponse = ITD, lower: Callable[..., Tensor] = cost, **fields: Any
) -> fm.Multilevel:
    return fm.Multilevel(
        fm.Level(
            "y", lower, torchopt.sgd(0.3), steps=3, tasks=N, init=lambda x: x, chunk=chunk, response=response, **fields
        ),
        fm.Level("x", lambda x, y, batch: ((y - batch) ** 2).sum(), torchopt.sgd(0.1)),
    )


BATCHES = {"y": GOALS, "x": GOALS + 1}


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(3)), fm.FiniteDifference()], ids=repr)
@pytest.mark.parametrize(("weight", "expected"), [(0.0, N), (100.0, 1)])
def test_nothing_but_time_follows(
    response: fm.BestResponse, weight: float, expected: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = together.descend

    def descend(*args: Any) -> Any:
        clock.now += 1 + weight * _tracing.mapping()
        return inner(*args)

    monkeypatch.setattr(together, "descend", descend)
    chosen = program("measure", response)
    reference = program(expected, response)
    for _ in range(2):
        state, metrics = chosen.step(chosen.init({"x": META}), BATCHES)
        plain, told = reference.step(reference.init({"x": META}), BATCHES)
        assert torch.equal(state.params["x"], plain.params["x"])
        assert torch.equal(metrics["y"]["costs"], told["y"]["costs"])
    roles = chosen._plan.roles.tasks
    assert roles["y"].at_once == roles["x"].at_once == expected
    all_at_once = program(None, response)
    gradient = chosen.hypergradient(chosen.init({"x": META}), BATCHES, of="x")
    expected_gradient = all_at_once.hypergradient(all_at_once.init({"x": META}), BATCHES, of="x")
    # Finite differences divide rounding by their step of about 1e-5.
    assert torch.allclose(gradient, expected_gradient, rtol=1e-7 if isinstance(response, fm.FiniteDifference) else 1e-12)


def asks(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    return cost(y, x, batch) if float(y.detach().sum()) > -100 else y.sum()


def test_what_no_map_can_evaluate_is_made_one_by_one() -> None:
    measured, looped = program("measure", lower=asks), program(1)
    state, _ = measured.step(measured.init({"x": META}), {"y": iter([GOALS] * 3), "x": GOALS + 1})
    assert measured._plan.roles.tasks["y"].at_once == 1
    assert torch.equal(state.params["x"], looped.step(looped.init({"x": META}), BATCHES)[0].params["x"])


def noisy(y: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    return cost(y, x, batch + torch.rand(3, dtype=torch.float64) / 9)


def test_draws_do_not_follow_from_a_measurement() -> None:
    different = program("measure", lower=noisy)
    with pytest.raises(fm.EstimatorError, match=r"level 'y': its loss draws random numbers.*randomness='same', or a number"):
        different.step(different.init({"x": META}), BATCHES)
    same, by_hand = program("measure", lower=noisy, randomness="same"), program(1, lower=noisy, randomness="same")
    got = same.hypergradient(same.init({"x": META}), BATCHES, of="x")
    assert torch.allclose(got, by_hand.hypergradient(by_hand.init({"x": META}), BATCHES, of="x"), rtol=1e-12)


def test_replicas_take_what_was_chosen() -> None:
    chosen = program("measure")
    many = fm.Replicas(chosen)
    states = many.stack([chosen.init({"x": META}), chosen.init({"x": 2 * META})])
    batches = {name: fm.Shared(batch) for name, batch in BATCHES.items()}
    after, _ = many.step(states, batches)
    alone, _ = chosen.step(chosen.init({"x": META}), BATCHES)
    assert torch.allclose(after.params["x"][0], alone.params["x"], rtol=1e-12)


def test_wrong_use() -> None:
    with pytest.raises(fm.DefinitionError, match=r"chunk='fast'; expected an integer of at least 1, 'measure', or None"):
        program("fast")
    with pytest.raises(fm.DefinitionError, match="chunk='measure' times the loop of a level with tasks=, which it has not"):
        fm.Level("x", cost, torchopt.sgd(0.1), chunk="measure")
    with pytest.raises(fm.DefinitionError, match=r"level 'y': chunk='measure' .* 'z' run before each of its updates"):
        fm.Multilevel(
            fm.Level("z", lambda z, y: ((z - y) ** 2).sum(), torchopt.sgd(0.1), tasks=N),
            fm.Level("y", lambda y, z, x: ((y - z) ** 2).sum() + (x * y).sum(), torchopt.sgd(0.1), tasks=N, chunk="measure"),
            fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        )
