"""What a reverse pass holds and how often it makes a step: counted in standings and steps, not in bytes and seconds."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch.multiprocessing.reductions import StorageWeakRef

import funcmlo as fm
from funcmlo.hypergrad.reverse import Rewind
from funcmlo.hypergrad.solved import Solved
from tests.oracles import bits
from tests.programs import SGD

ARITIES = (2, 3, 4, 5)


@dataclass(frozen=True, eq=False)
class Token:
    """Parameters that tell which standing they are, and no more."""

    t: int


def depths(steps: int, arity: int) -> int:
    """⌈log_k T⌉."""
    return next(d for d in range(steps) if arity**d >= steps) if steps > 1 else 0


def passed(memory: fm.Checkpoint | str, steps: int, window: int | None = None) -> tuple[int, Counter[int], list[int], int]:
    """Run a reverse pass whose steps do nothing; return the most standings held, and which steps were made and undone."""
    live: weakref.WeakSet[Token] = weakref.WeakSet()
    made: Counter[int] = Counter()
    undone: list[int] = []
    most = 0

    def token(t: int) -> Token:
        nonlocal most
        live.add(made_token := Token(t))
        most = max(most, len(live))
        return made_token

    def update(at: Token, state: tuple, inputs: dict, t: int) -> tuple[Token, tuple]:
        assert at.t == t  # the standing before step t, and no other
        made[t] += 1
        return token(t + 1), state

    def undo(self: Rewind, t: int, standing: tuple[Token, tuple], bar: list) -> list:
        assert standing[0].t == t
        undone.append(t)
        return bar

    response = fm.ITD(memory=memory, window=window)
    first = max(0, steps - (window or steps))
    begin = (token(0), ())
    kept = {t: begin if t == 0 else (token(t), ()) for t in response.keep(steps).before}
    solved = Solved({}, (), {}, begin, steps, None, update, lambda inputs: begin, None, kept=kept)
    rewind = Rewind(solved, response._schedule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewind, "_step", undo)
        rewind.pullback({}, first)
    assert undone == list(range(first, steps))[::-1]
    assert rewind.replayed == sum(made.values())
    assert all(t >= first for t in made)
    return most, made, undone, rewind.replayed


# The loop itself makes every step once, and what differentiates a step makes it once more: two in each bound.


@pytest.mark.parametrize("window", [None, 37])
def test_root_checkpoints_hold_two_roots_of_standings(window: int | None) -> None:
    for steps in range(1, 201):
        most, made, undone, replayed = passed(fm.Checkpoint(), steps, window)
        length = len(undone)
        assert most <= 2 * math.sqrt(length) + 1
        assert max(made.values(), default=0) + 2 <= 3
        assert replayed <= length


@pytest.mark.parametrize("arity", ARITIES)
@pytest.mark.parametrize("window", [None, 37])
def test_recursive_checkpoints_hold_a_few_standings_for_each_depth(arity: int, window: int | None) -> None:
    for steps in range(1, 201):
        most, made, undone, replayed = passed(fm.Checkpoint(arity), steps, window)
        length = len(undone)
        depth = depths(length, arity)
        assert depth < math.log(length, arity) + 1
        assert most <= (arity - 1) * depth + 2 <= arity * depth + 2
        assert max(made.values(), default=0) + 2 <= max(2, 1 + depth)
        assert replayed <= max(0, depth - 1) * length


def test_what_keeps_every_standing_replays_nothing() -> None:
    for steps in range(1, 60):
        most, _, _, replayed = passed("recompute", steps)
        assert most <= steps + 1
        assert replayed == 0


class Watched:
    """A level whose loss sees every standing: it draws dropout, and knows its step from its batch, made at each call."""

    def __init__(self, optimizer: torchopt.base.GradientTransformation, steps: int, memory: fm.Checkpoint | str) -> None:
        self.seen: dict[int, list[bytes]] = {}
        self.times: Counter[int] = Counter()
        self.storages: list[StorageWeakRef] = []
        self.most = 0
        self.program = fm.Multilevel(
            fm.Level("y", self.loss, optimizer, steps=steps, response=fm.ITD(memory=memory)),
            fm.Level("x", lambda x, y: (y**2).sum(), SGD),
        )
        self.state = self.program.init({"y": torch.linspace(-1, 1, 8).double(), "x": torch.zeros(8).double()}, seed=3)

    def loss(self, y: torch.Tensor, x: torch.Tensor, batch: tuple[int, torch.Tensor]) -> torch.Tensor:
        t, target = batch
        draws = F.dropout(torch.ones_like(y), 0.5)
        self.times[t] += 1
        if t in self.seen:  # a standing made again, and its draws, are the first ones to the bit
            assert self.seen[t] == bits((y.detach(), draws, target))
        self.seen.setdefault(t, bits((y.detach(), draws, target)))
        # How many different standings are alive now, whoever holds them: their storages are.
        self.storages = [s for s in self.storages if not s.expired()]
        if (storage := StorageWeakRef(y.untyped_storage())) not in self.storages:
            self.storages.append(storage)
        self.most = max(self.most, len(self.storages))
        return (draws * (y - target) ** 2).mean() + (x.exp() * y**2).mean()

    def batch(self, t: int) -> tuple[int, torch.Tensor]:
        return t, torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(t))

    def hypergradient(self) -> tuple[torch.Tensor, fm.Stats]:
        gradient, stats = self.program.hypergradient(self.state, {"y": self.batch}, of="x", with_stats=True)
        return gradient, stats["y"]


OPTIMIZERS = {"sgd": SGD, "momentum": torchopt.sgd(0.1, momentum=0.9), "adam": torchopt.adam(0.05)}
STEPS = 90
HELD = {"recompute": STEPS, fm.Checkpoint(): 2 * 10, fm.Checkpoint(2): 1 + 7, fm.Checkpoint(5): 1 + 4 * 3}
"""Standings: T, 2⌈√T⌉, and 1 + (k − 1)⌈log_k T⌉."""
MADE = {"recompute": 2, fm.Checkpoint(): 3, fm.Checkpoint(2): 1 + 7, fm.Checkpoint(5): 1 + 3}


@pytest.mark.parametrize("memory", HELD, ids=repr)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_program_holds_no_more_and_replays_to_the_bit(optimizer: str, memory: fm.Checkpoint | str) -> None:
    expected, _ = Watched(OPTIMIZERS[optimizer], STEPS, "store").hypergradient()
    watched = Watched(OPTIMIZERS[optimizer], STEPS, memory)
    gradient, stats = watched.hypergradient()
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)
    assert HELD[memory] / 2 <= watched.most <= HELD[memory]
    assert max(watched.times.values()) == MADE[memory]
    assert sum(watched.times.values()) == 2 * STEPS + stats.replayed
    assert (stats.replayed == 0) == (memory == "recompute")


def test_schedules_with_the_same_steps_answer_to_the_bit() -> None:
    answers = [bits(Watched(OPTIMIZERS["adam"], 40, memory).hypergradient()[0]) for memory in HELD]
    assert answers == [answers[0]] * len(answers)


def test_costs_are_kept_in_one_piece() -> None:
    """Small tensors that stay, one for each step, riddle the heap: the process then takes several times what is held."""
    alive: list[StorageWeakRef] = []
    most = 0

    def loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        nonlocal most
        cost = ((y - x) ** 2).sum()
        alive.append(StorageWeakRef(cost.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in alive))
        return cost

    p = fm.Multilevel(
        fm.Level("y", loss, SGD, steps=50, response=fm.ITD(memory=fm.Checkpoint())), fm.Level("x", lambda x, y: y.sum(), SGD)
    )
    state = p.init({"y": torch.zeros(3).double(), "x": torch.ones(()).double()})
    _, metrics = p.step(state, {})
    assert most <= 3
    assert torch.allclose(metrics["y"]["costs"], 3 * 0.64 ** torch.arange(50.0).double())


def test_batches_are_not_kept() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def batch(t: int) -> torch.Tensor:
        nonlocal most
        made = torch.full((3,), float(t), dtype=torch.float64)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    p = fm.Multilevel(
        fm.Level(
            "y", lambda y, x, batch: ((y - batch * x) ** 2).sum(), SGD, steps=50, response=fm.ITD(memory=fm.Checkpoint())
        ),
        fm.Level("x", lambda x, y: y.sum(), SGD),
    )
    state = p.init({"y": torch.zeros(3).double(), "x": torch.ones(()).double()})
    p.hypergradient(state, {"y": batch}, of="x")
    assert most <= 3
