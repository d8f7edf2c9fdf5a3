"""The order of one outer step: who steps when, with warm-up, roll-back, several tops and shared lower levels."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torchopt
from hypothesis import given
from hypothesis import strategies as st
from torchopt.base import GradientTransformation

import funcmlo as fm
from tests.hierarchies import Hierarchy, hierarchies
from tests.oracles import bits
from tests.programs import Spy

SGD = torchopt.sgd(0.1)
AID = fm.AID(fm.CG(5))


def square(own: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return ((own - sum(others)) ** 2).sum() + sum((x**2).sum() for x in others)


def program(reads: Mapping[str, Sequence[str]], settings: dict[str, dict] | None = None, **common) -> fm.Multilevel:
    """A program from «level: the levels that its cost reads», one letter each."""
    settings = settings or {}
    levels = [
        fm.Level(name, square, SGD, reads={x: x for x in sources}, **{"response": AID, **settings.get(name, {})})
        if sources
        else fm.Level(name, lambda own: (own**2).sum(), SGD, **{"response": AID, **settings.get(name, {})})
        for name, sources in reads.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        return fm.Multilevel(*levels, **common)


def steps(**numbers: int) -> dict[str, dict]:
    return {name: {"steps": n} for name, n in numbers.items()}


def executed(p: fm.Multilevel) -> list[str]:
    """The levels in the order in which their optimizers were really called in one outer step."""
    called: list[str] = []

    def spying(name: str) -> GradientTransformation:
        def update(updates, state, *, params=None, inplace=False):
            called.append(name)
            return {"x": -0.1 * updates["x"]}, state

        return GradientTransformation(lambda params: (), update)

    def tree(level):
        if not level.reads:
            return lambda own: level.loss(own["x"])
        return lambda own, *others: level.loss(own["x"], *(other["x"] for other in others))

    # An estimator that solves nothing again, so that only the schedule's own updates are seen.
    levels = [replace_level(x, loss=tree(x), optimizer=spying(x.name), response=Mute()) for x in p.levels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        spied = fm.Multilevel(*levels, composition=p.composition)
    spied.step(spied.init({name: {"x": torch.ones(2)} for name in p.graph.levels}), {})
    return called


class Mute(fm.BestResponse):
    claims = fm.Claims(differentiable=True)

    def vjp(self, solved, cotangent, state):
        zeros = {name: {"x": 0 * x["x"]} for name, x in solved.inputs.items()}
        return zeros, state, fm.Stats()


def replace_level(level: fm.Level, **changes: object) -> fm.Level:
    names = ("loss", "optimizer", "steps", "response", "reads", "init", "project", "warmup", "roll_back", "maximize")
    given = {name: getattr(level, name) for name in names} | changes
    return fm.Level(level.name, given.pop("loss"), given.pop("optimizer"), **given)


ORDERS = {
    "two levels": (program({"a": "b", "b": "a"}, steps(a=2)), "aab"),
    "a chain": (program({"a": "b", "b": "ac", "c": "b"}, steps(a=2, b=2)), "aabaabc"),
    "a pipeline": (program({"a": "c", "b": "a", "c": "b"}, steps(a=2, b=2)), "aabaabc"),
    "two tops over one level": (program({"a": "bc", "b": "a", "c": "a"}, steps(a=2)), "aabc"),
    "tops of different steps": (program({"a": "bc", "b": "a", "c": "a"}, steps(a=2, b=3)), "aabaabaabc"),
    "the last top with more steps": (program({"a": "bc", "b": "a", "c": "a"}, steps(a=1, c=2)), "abcac"),
    "two programs side by side": (program({"a": "b", "b": "a", "c": "d", "d": "c"}, steps(a=2, c=3)), "aabcccd"),
    "uppers of different steps": (program({"a": "bc", "b": "ad", "c": "ad", "d": "bc"}, steps(a=1, b=2, c=1)), "acbabd"),
    "a level that reads itself only": (program({"a": "", "b": "c", "c": "b"}, steps(a=3)), "aaabc"),
    "a level that nobody reads": (program({"a": "b", "b": ""}, steps(a=2)), "aab"),
    "a level solved where it stands": (program({"a": "b", "b": "ac", "c": "b"}, steps(a=2, b=0)), "aac"),
    "a chain, nested": (program({"a": "b", "b": "ac", "c": "b"}, steps(a=2, b=2), composition="nested"), "aabaabc"),
    "a top that reads all, nested": (
        program({"a": "b", "b": "ac", "c": "ab"}, steps(a=2, b=1), composition="nested"),
        "aabaac",  # a is solved again where b has moved
    ),
    "a top that reads all": (program({"a": "b", "b": "ac", "c": "ab"}, steps(a=2, b=1)), "aabc"),
}


@pytest.mark.parametrize(("p", "order"), ORDERS.values(), ids=ORDERS)
def test_the_order_is_as_told_and_as_run(p: fm.Multilevel, order: str) -> None:
    assert "".join(p.schedule()) == order
    assert "".join(executed(p)) == order


@given(h=hierarchies(most=4), numbers=st.lists(st.integers(0, 2), min_size=4, max_size=4))
@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_random_programs_run_as_their_schedule_tells(composition: str, h: Hierarchy, numbers: list[int]) -> None:
    tops = fm.Graph.of(h.levels()).tops
    counts = {name: max(n, 1) if name in tops else n for name, n in zip(h.names, numbers, strict=False)}
    p = program(h.reads, steps(**counts), composition=composition)
    assert executed(p) == list(p.schedule())


@given(h=hierarchies(most=4), numbers=st.lists(st.integers(1, 2), min_size=4, max_size=4), seed=st.integers(0, 99))
@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_the_hypergradient_is_what_step_gives_the_optimizer_first(
    composition: str, h: Hierarchy, numbers: list[int], seed: int
) -> None:
    first: dict[str, torch.Tensor] = {}

    def catching(name: str) -> GradientTransformation:
        def update(updates, state, *, params=None, inplace=False):
            first.setdefault(name, updates.detach().clone())
            return -0.3 * updates, state

        return GradientTransformation(lambda params: (), update)

    levels = [
        replace_level(level, optimizer=catching(level.name), steps=n) for level, n in zip(h.levels(), numbers, strict=False)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        p = fm.Multilevel(*levels, composition=composition)
    state = p.init(h.start(seed))
    answers = {}
    for k in h.names:
        answers[k] = p.hypergradient(state, {}, of=k)
    first.clear()
    p.step(state, {})
    for k in h.names:
        assert bits(answers[k]) == bits(first[k]), k


def test_a_schedule_prints_itself() -> None:
    p = program({"a": "b", "b": "ac", "c": "b"}, {"a": {"steps": 2, "warmup": 4}, "b": {"steps": 3, "roll_back": True}})
    assert str(p.schedule()).splitlines() == [
        "c: 1 update",
        "  before it: b: 3 updates, rolled back to its start and one update after its upper levels' update",
        "    before each: a: 2 updates, the first time after 4 more to warm up",
    ]
    uneven = program({"a": "bc", "b": "ad", "c": "ad", "d": "bc"}, steps(a=1, b=2, c=1))
    assert str(uneven.schedule()).splitlines() == [
        "d: 1 update",
        "  before it: c: 1 update",
        "    before it: a: 1 update",
        "  before it: b: 2 updates",
        "    before each later one: a: 1 update",
    ]
    assert repr(p.schedule()) == str(p.schedule())


def test_warming_up_is_done_once_and_takes_its_batches() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x, batch: ((y - x) ** 2).sum() + batch * y.sum(), SGD, steps=2, warmup=5, response=fm.ITD()),
        fm.Level("x", lambda x, y: (y**2).sum(), SGD),
    )
    state = p.init({"y": torch.zeros(2), "x": torch.ones(2)})
    batches = {"y": (torch.tensor(float(t)) for t in itertools.count())}
    state, metrics = p.step(state, batches)
    assert state.step == {"y": 7, "x": 1}
    assert len(metrics["y"]["costs"]) == 2
    state, _ = p.step(state, batches)
    assert state.step == {"y": 9, "x": 2}
    assert next(batches["y"]) == 9.0


@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_warming_up_is_not_differentiated(composition: str) -> None:
    settings = {"steps": 1, "response": fm.ITD()}
    warm = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), warmup=3, **settings),
        fm.Level("x", lambda x, y: y.sum(), SGD),
        composition=composition,
    )
    state = warm.init({"y": torch.zeros(1), "x": torch.ones(1)})
    assert torch.equal(warm.hypergradient(state, {}, of="x"), torch.tensor([0.5]))  # of the one step after it
    y = torch.zeros(1)
    for _ in range(4):
        y = y - 0.5 * (y - 1.0)
    assert torch.equal(warm.step(state, {})[0].params["y"], y)


@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_a_level_between_warms_up_with_its_lower_levels(composition: str) -> None:
    p = program(
        {"a": "b", "b": "ac", "c": "b"}, {"a": {"steps": 2}, "b": {"steps": 1, "warmup": 3}}, composition=composition
    )
    state, _ = p.step(p.init({name: torch.ones(2) for name in "abc"}), {})
    assert state.step == {"a": 8, "b": 4, "c": 1}
    state, _ = p.step(state, {})
    assert state.step == {"a": 10, "b": 5, "c": 2}


@pytest.mark.parametrize("kind", ["fixed", "indexed", "iterator"])
def test_roll_back_is_a_look_ahead(kind: str) -> None:
    # DARTS: the weights look ahead, the architecture moves, the weights make one step from where they were, with the
    # batch of the look-ahead's first step and the new architecture.
    def low(y, x, batch):
        return ((y - x * batch) ** 2).sum()

    def up(x, y):
        return (y**2).sum() + (x**3).sum()

    numbers = [torch.tensor(1.0 if kind == "fixed" else 1.0 + t / 8) for t in range(40)]
    batches = {"fixed": numbers[0], "indexed": lambda t: numbers[t], "iterator": iter(numbers)}[kind]
    optimizer = torchopt.sgd(0.1, momentum=0.9)
    ahead = fm.Multilevel(
        fm.Level("y", low, optimizer, steps=3, response=fm.ITD(), roll_back=True), fm.Level("x", up, torchopt.adam(0.1))
    )
    plain = fm.Multilevel(fm.Level("y", low, optimizer, steps=3, response=fm.ITD()), fm.Level("x", up, torchopt.adam(0.1)))
    one = fm.Multilevel(fm.Level("y", low, optimizer, steps=1, response=fm.ITD()), fm.Level("x", up, torchopt.adam(0.1)))
    state = plain.init({"y": torch.zeros(2), "x": torch.ones(2)})
    for i in range(2):
        drawn = 4 * i if kind == "iterator" else i  # an iterator's look-ahead is gone with the call
        source = numbers[drawn:] if kind == "iterator" else numbers[i:]
        looked, _ = plain.step(state, {"y": iter(source)})
        moved = replace(state, params={**state.params, "x": looked.params["x"]})
        expected, _ = one.step(moved, {"y": iter(source)})
        after, metrics = ahead.step(state, {"y": batches if kind != "iterator" else iter(source)})
        assert len(metrics["y"]["costs"]) == 3
        assert bits(after.params["x"]) == bits(looked.params["x"])
        assert bits(after.params["y"]) == bits(expected.params["y"])
        assert bits(after.optimizer["y"]) == bits(expected.optimizer["y"])
        assert after.step == {"y": i + 1, "x": i + 1}
        state = after


def test_roll_back_below_a_level_between() -> None:
    # a looks ahead before each update of b and returns after it, so that it makes one lasting update for each of b's.
    p = program({"a": "b", "b": "ac", "c": "b"}, {"a": {"steps": 3, "roll_back": True}, "b": {"steps": 2}})
    state, _ = p.step(p.init({name: torch.ones(2) for name in "abc"}), {})
    assert state.step == {"a": 2, "b": 2, "c": 1}


def test_after_a_warm_up_the_levels_below_run_again() -> None:
    # b's wait for a is served by a's loop before c when it warms up, and not again after that.
    p = program({"a": "bc", "b": "ad", "c": "ad", "d": "bc"}, {"b": {"warmup": 1}})
    assert "".join(p.schedule()) == "acbd"
    state, _ = p.step(p.init({name: torch.ones(2) for name in "abcd"}), {})
    assert state.step == {"a": 2, "b": 2, "c": 1, "d": 1}


def test_a_start_may_read_a_solution_below() -> None:
    # finetune begins where pretrain ended: y₁ = z* − r(z* − 1), and z* = x.
    for composition in ("paths", "nested"):
        p = fm.Multilevel(
            fm.Level("z", lambda z, x: ((z - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=fm.AID(fm.CG(3))),
            fm.Level(
                "y", lambda y: ((y - 1) ** 2).sum() / 2, torchopt.sgd(0.25), init=lambda z: z, steps=1, response=fm.ITD()
            ),
            fm.Level("x", lambda x, y: (y**2).sum() / 2, torchopt.sgd(0.1)),
            composition=composition,
        )
        assert ("z", "y") in p.graph.l2u
        state = p.init({"z": torch.zeros(1), "x": torch.tensor([3.0])})
        answer = p.hypergradient(state, {}, of="x")
        assert torch.allclose(answer, torch.tensor([0.75 * (3 - 0.25 * 2)]))


def test_an_optimizer_may_read_a_level_below() -> None:
    for composition in ("paths", "nested"):
        p = fm.Multilevel(
            fm.Level("z", lambda z, x: ((z - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=fm.AID(fm.CG(3))),
            fm.Level("y", lambda y: ((y - 1) ** 2).sum() / 2, lambda z: torchopt.sgd(z), steps=1, response=fm.ITD()),
            fm.Level("x", lambda x, y: (y**2).sum() / 2, torchopt.sgd(0.1)),
            composition=composition,
        )
        state = p.init({"z": torch.tensor(0.0), "y": torch.tensor(3.0), "x": torch.tensor(0.25)})
        # y₁ = 3 − z*(3 − 1) and z* = x, so d(y₁²/2)/dx = y₁ · (−2).
        assert torch.allclose(p.hypergradient(state, {}, of="x"), torch.tensor(-2 * 2.5))


@given(seed=st.integers(0, 2**10))
def test_batches_and_seeds_count_every_update(seed: int) -> None:
    seen: list[tuple[str, int]] = []

    def source(name):
        def at(t):
            seen.append((name, t))
            return torch.tensor(float(t))

        return at

    p = fm.Multilevel(
        fm.Level("a", lambda a, c, batch: ((a - c) ** 2 * torch.rand(2)).sum() + batch, SGD, steps=2, response=AID),
        fm.Level("b", lambda b, a, batch: ((b - a) ** 2).sum() + batch, SGD, steps=2, response=AID),
        fm.Level("c", lambda c, b: (b**2).sum(), SGD),
    )
    state = p.init({name: torch.ones(2) for name in "abc"}, seed=seed)
    once, _ = p.step(state, {"a": source("a"), "b": source("b")})
    assert list(dict.fromkeys(seen)) == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 3), ("b", 1)]
    assert once.step == {"a": 4, "b": 2, "c": 1}
    again, _ = p.step(state, {"a": source("a"), "b": source("b")})
    assert bits(once.params) == bits(again.params)


def first_gradients(p: fm.Multilevel, state: fm.State, batches: dict) -> dict[str, torch.Tensor]:
    """What `step` gives each level's optimizer first."""
    first: dict[str, torch.Tensor] = {}

    def catching(level: fm.Level) -> GradientTransformation:
        def update(updates, state, *, params=None, inplace=False):
            first.setdefault(level.name, updates.detach().clone())
            return optimizer.update(updates, state, params=params, inplace=False)

        optimizer = level.optimizer_for({})
        return GradientTransformation(optimizer.init, update)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        spied = fm.Multilevel(*(replace_level(x, optimizer=catching(x)) for x in p.levels), composition=p.composition)
    spied.step(state, batches)
    return first


@pytest.mark.filterwarnings("ignore:level 'b' reads 'c', but the gradient of its cost does not depend on it")
@pytest.mark.parametrize("composition", ["paths", "nested"])
def test_levels_that_are_taken_as_solved_get_their_batches_and_do_not_begin(composition: str) -> None:
    p = fm.Multilevel(
        fm.Level("a", lambda a, c, batch: ((a - c * batch) ** 2).sum() / 2, SGD, steps=0, response=AID),
        fm.Level(
            "b", lambda b, a, c: ((b - a) ** 2).sum() / 2 + 0 * c.sum(), SGD, steps=0, init=lambda c: 5 * c, response=AID
        ),
        fm.Level("c", lambda c, b: (b**2).sum(), torchopt.sgd(0.5)),
        composition=composition,
    )
    state = p.init({name: torch.ones(2) for name in "abc"})
    batches = {"a": torch.full((2,), 3.0)}
    assert torch.allclose(p.hypergradient(state, batches, of="c"), torch.full((2,), 6.0))
    assert bits(p.hypergradient(state, batches, of="c")) == bits(first_gradients(p, state, batches)["c"])
    assert torch.equal(p.hypergradient(state, batches, of="b"), torch.zeros(2))  # where it stands, not at 5c
    with pytest.raises(fm.BatchError, match="level 'a' takes a batch"):
        p.hypergradient(state, {}, of="c")


def test_a_level_that_is_solved_where_it_stands_does_not_begin_for_those_below_it() -> None:
    p = fm.Multilevel(
        fm.Level("a", lambda a, b: ((a - b) ** 2).sum() / 2, SGD, response=AID),
        fm.Level(
            "b", lambda b, a, c: ((b - c) ** 2).sum() / 2 + (a * b).sum(), SGD, steps=0, init=lambda c: 5 * c, response=AID
        ),
        fm.Level("c", lambda c, b: (b**2).sum(), SGD),
        composition="nested",
    )
    state = p.init({name: torch.ones(2) for name in "abc"})
    assert torch.equal(p.hypergradient(state, {}, of="a"), torch.zeros(2))  # at b = 1, not at 5c
    assert bits(first_gradients(p, state, {})["a"]) == bits(torch.zeros(2))


@pytest.mark.parametrize("composition", ["paths", "nested"])
@given(h=hierarchies(most=4), numbers=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=4, max_size=4))
def test_with_warm_ups_too_the_hypergradient_is_what_step_gives_first(
    composition: str, h: Hierarchy, numbers: list[tuple[int, int]]
) -> None:
    tops = fm.Graph.of(h.levels()).tops
    levels = [
        replace_level(
            x, steps=max(n, 1) if x.name in tops else n, warmup=0 if x.name in tops else w, optimizer=torchopt.sgd(0.1)
        )
        for x, (n, w) in zip(h.levels(), numbers, strict=False)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        p = fm.Multilevel(*levels, composition=composition)
    state = p.init(h.start(1))
    for k, gradient in first_gradients(p, state, {}).items():
        assert bits(p.hypergradient(state, {}, of=k)) == bits(gradient), k


def test_a_second_top_level_that_shares_a_lower_one_steps_as_often_nested() -> None:
    reads = {"a": "uv", "u": "a", "v": "a"}
    for composition in ("paths", "nested"):
        p = program(reads, steps(u=2), composition=composition)
        state, _ = p.step(p.init({name: torch.ones(2) for name in "auv"}), {})
        assert (state.step["u"], state.step["v"]) == (2, 1)


def test_a_level_between_runs_again_to_the_bit() -> None:
    # What an estimator of "replay" sees: changing lower inputs, the hypergradient's indirect part, Adam's state.
    spy = Spy()
    p = program_with(spy)
    state = p.init({name: torch.tensor([0.5, -1.0]).double() * (i + 1) for i, name in enumerate("abc")})
    p.hypergradient(state, {}, of="c")
    (solved,) = spy.seen
    y, s = solved.start(solved.inputs)
    assert bits((y, s)) == bits(solved.init)
    for t in range(solved.steps):
        y, s = solved.update(y, s, solved.inputs, t)
    assert bits(y) == bits(solved.params)
    assert bits(s) == bits(solved.opt_state)


def program_with(response: fm.BestResponse) -> fm.Multilevel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fm.FuncmloWarning)
        return fm.Multilevel(
            fm.Level("a", lambda a, b, c: ((a - torch.sin(b) * c) ** 2).sum(), torchopt.sgd(0.3), steps=3, response=AID),
            fm.Level(
                "b", lambda b, a, c: ((b - c) ** 2).sum() + (a * b).sum(), torchopt.adam(0.2), steps=4, response=response
            ),
            fm.Level("c", lambda c, b: (b**2).sum(), SGD),
        )


def test_itd_sums_a_lower_inputs_cotangents_over_its_steps() -> None:
    # y_T = y₀(1 − r)^T + Σ r(1 − r)^{T−1−t} z_t, where z* = x at each step: dy_T/dx = 1 − (1 − r)^T.
    p = fm.Multilevel(
        fm.Level("z", lambda z, x: ((z - x) ** 2).sum() / 2, torchopt.sgd(1.0), response=AID),
        fm.Level("y", lambda y, z: ((y - z) ** 2).sum() / 2, torchopt.sgd(0.25), steps=3, response=fm.ITD()),
        fm.Level("x", lambda x, y: y.sum(), SGD),
    )
    state = p.init({"z": torch.zeros(1), "y": torch.zeros(1), "x": torch.ones(1)})
    assert torch.allclose(p.hypergradient(state, {}, of="x"), torch.tensor([1 - 0.75**3]))
