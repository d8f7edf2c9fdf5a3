"""Compiled programs: the same numbers, no compilation but the first, and what is said where nothing is compiled."""

from __future__ import annotations

import shutil
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo.compiler import DIGITS, apart
from tests.oracles import bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")

torch.manual_seed(0)
X, Y = torch.randn(24, 5, dtype=torch.float64), (torch.randn(24) > 0).double()
START = {"w": torch.zeros(5).double(), "x": torch.full((5,), -2.0).double()}
ROUNDING = 2.0**16 * torch.finfo(torch.float64).eps  # DIGITS, through some steps and products


def lower(w: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
    fit = F.binary_cross_entropy_with_logits(batch[0] @ w, batch[1])
    return fit + (x.exp() * w**2).sum() / 2, {"fit": fit}


def upper(x: Tensor, w: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(X[:9] @ w, Y[:9]) + x.mean() / 100


def program(response: fm.BestResponse | None = None, cost: Any = lower, **fields: Any) -> fm.Multilevel:
    fields = {"steps": 6, "response": response or fm.ITD(), **fields}
    return fm.Multilevel(fm.Level("w", cost, torchopt.adam(0.1), **fields), fm.Level("x", upper, torchopt.adam(0.1)))


def close(found: Any, expected: Any) -> bool:
    return all(
        torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING)
        for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True)
        if isinstance(a, Tensor)
    )


@pytest.fixture(autouse=True)
def strict() -> Any:
    """A fall-back would be a warning, and warnings are errors; what torch's compiler itself says is not looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.")
        yield


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(4)), fm.FiniteDifference()], ids=["itd", "cg", "difference"])
def test_steps_and_products_are_compiled_once_for_any_number_of_them(response: fm.BestResponse) -> None:
    written, fast = program(response), program(response).compile()
    state = other = written.init(START)
    for k in range(3):  # other batches of the same form
        batches = {"w": (X + k, Y)}
        assert close(fast.hypergradient(other, batches, of="x"), written.hypergradient(state, batches, of="x"))
        state, metrics = written.step(state, batches)
        other, compiled = fast.step(other, batches)
        assert close((other.params, other.optimizer), (state.params, state.optimizer))
        assert close(compiled["w"]["costs"], metrics["w"]["costs"])
        assert close(compiled["w"]["aux"], metrics["w"]["aux"])
        assert close(compiled["w"]["gradient_norm"], metrics["w"]["gradient_norm"])
    assert fast.compiler is not None
    # A step, and for CG the products of two kinds; ITD's steps with and without their costs.
    told = [one.name.split(": ")[1] for one in fast.compiler.told]
    assert len(told) == len(set(told)) == {"ITD": 2, "AID": 3, "FiniteDifference": 1}[type(response).__name__]
    assert all(one.why is None and one.difference <= DIGITS for one in fast.compiler.told)
    assert written.compiler is None


def test_batches_may_come_from_a_function() -> None:
    written, fast = program(fm.AID(fm.CG(4))), program(fm.AID(fm.CG(4))).compile()
    batches = {"w": lambda t: (X * (1 + t / 10), Y)}
    state = written.init(START)
    assert close(fast.hypergradient(state, batches, of="x"), written.hypergradient(state, batches, of="x"))
    assert len(fast.compiler.told) == 3


def test_a_number_in_a_batch_may_change() -> None:
    def cost(w: Tensor, x: Tensor, batch: tuple[Tensor, float]) -> Tensor:
        return ((w - batch[1] * x * batch[0]) ** 2).sum() / 2

    written = fm.Multilevel(
        fm.Level("w", cost, torchopt.sgd(0.5), steps=3, response=fm.AID(fm.CG(2))), fm.Level("x", upper, torchopt.sgd(0.1))
    )
    fast, state = written.compile(), written.init(START)
    for number in (1.0, 3.0):
        batches = {"w": (X[0], number)}
        assert close(fast.hypergradient(state, batches, of="x"), written.hypergradient(state, batches, of="x"))


def noisy(w: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
    return lower(w, x, (F.dropout(batch[0], 0.3), batch[1]))


def talking(w: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
    print("", end="")
    return lower(w, x, batch)


def looking(w: Tensor, x: Tensor, batch: tuple[Tensor, Tensor]) -> Any:
    return lower(w if w.sum() < 100 else -w, x, batch)


@pytest.mark.parametrize(
    ("cost", "why"), [(noisy, "draws random numbers"), (talking, "calls print"), (looking, "reads a value")]
)
def test_what_is_not_compiled_says_why_and_answers_all_the_same(cost: Any, why: str) -> None:
    written, fast = program(fm.AID(fm.CG(3)), cost), program(fm.AID(fm.CG(3)), cost).compile()
    state = written.init(START)
    expected = written.hypergradient(state, {"w": (X, Y)}, of="x")
    with pytest.warns(fm.FuncmloWarning, match=why):
        found = fast.hypergradient(state, {"w": (X, Y)}, of="x")
    assert close(found, expected)
    told = len(fast.compiler.told)
    fast.hypergradient(state, {"w": (X, Y)}, of="x")  # and says it once
    assert len(fast.compiler.told) == told
    assert why in str(fast.compiler)


def test_a_compiler_that_errs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from funcmlo.compiler import compiled as real

    def wrong(*settings: Any) -> Any:
        made = real(*settings)

        def make(outside: Any) -> Any:
            forward, backward = made(outside)
            return lambda *z: ([1.001 * x for x in forward(*z)[0]], forward(*z)[1]), backward

        return make

    monkeypatch.setattr("funcmlo.compiler.compiled", wrong)
    fast = program(fm.AID(fm.Identity())).compile()
    state = fast.init(START)
    with pytest.warns(fm.FuncmloWarning, match="differs from the eager one by"):
        found = fast.hypergradient(state, {"w": (X, Y)}, of="x")
    assert bits(found) == bits(program(fm.AID(fm.Identity())).hypergradient(state, {"w": (X, Y)}, of="x"))

    def failing(*settings: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("funcmlo.compiler.compiled", failing)
    fast = program(fm.AID(fm.Identity())).compile()
    with pytest.warns(fm.FuncmloWarning, match="RuntimeError: no compiler here"):
        assert bits(fast.hypergradient(state, {"w": (X, Y)}, of="x")) == bits(found)


def test_answers_are_held_against_what_they_change() -> None:
    y, far = torch.ones(3), torch.ones(3) * 1e6
    step = torch.tensor([1e-4, 0.0, 1e-4])
    assert apart(([y + step], []), ([y + step], []), [y]) == 0
    assert apart(([y + 1.01 * step], []), ([y + step], []), [y]) > DIGITS  # 1 % of the step, 1e-6 of the parameters
    assert apart(([far + 1 + 0.06], []), ([far + 1], []), [far]) == 0  # nothing but rounding
    assert apart(([y * torch.nan], []), ([y + step], []), [y]) != 0
    assert apart(([], [None]), ([], [y]), []) == float("inf")
    noise = torch.tensor([1e-9])
    assert apart(([y, y, noise], []), ([y, y, -noise], []), [y]) < DIGITS  # zero but for rounding, beside ones


# As a whole


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(3))], ids=["itd", "cg"])
def test_a_call_as_one_graph(response: fm.BestResponse) -> None:
    written, fast = program(response, steps=3), program(response, steps=3).compile(unroll="whole")
    state = other = written.init(START, seed=3)
    for k in range(2):
        batches = {"w": (X + k, Y)}
        gradient, stats = fast.hypergradient(other, batches, of="x", with_stats=True)
        expected, written_stats = written.hypergradient(state, batches, of="x", with_stats=True)
        assert close(gradient, expected)
        assert stats["w"].hvps == written_stats["w"].hvps
        state, metrics = written.step(state, batches)
        other, compiled = fast.step(other, batches)
        assert close((other.params, other.optimizer), (state.params, state.optimizer))
        assert (other.step, other.seed) == (state.step, state.seed)
        assert compiled.keys() == metrics.keys()
        assert close(compiled["x"]["cost"], metrics["x"]["cost"])
        assert type(compiled["x"]["stats"]["w"]) is fm.Stats
    assert [one.name for one in fast.compiler.told] == ["hypergradient of x", "step"]


def test_a_whole_with_tasks() -> None:
    targets = torch.linspace(1, 3, 8).reshape(4, 2).double()
    made = fm.Multilevel(
        fm.Level("w", lambda w, x, batch: ((w - x * batch) ** 2).sum() / 2, torchopt.sgd(0.2), steps=2, tasks=4,
                 init=lambda x: x, response=fm.ITD()),
        fm.Level("x", lambda x, w: w.sin().sum(), torchopt.sgd(0.1)),
    )  # fmt: skip
    state, fast = made.init({"x": torch.ones(2).double()}), made.compile(unroll="whole")
    found = fast.hypergradient(state, {"w": targets}, of="x")
    assert close(found, made.hypergradient(state, {"w": targets}, of="x"))
    assert [one.why for one in fast.compiler.told] == [None]


def test_a_whole_that_cannot_be_had_goes_by_steps_and_errors_stay_what_they_are() -> None:
    written = program(fm.AID(fm.CG(2)), steps=2)
    fast, state = written.compile(unroll="whole"), written.init(START)
    batches = {"w": lambda t: (X, Y)}
    assert close(fast.hypergradient(state, batches, of="x"), written.hypergradient(state, batches, of="x"))
    assert "w: step" in str(fast.compiler)
    assert "hypergradient" not in str(fast.compiler)
    with pytest.raises(fm.BatchError, match="takes a batch, but none came"):
        fast.hypergradient(state, {}, of="x")
    with pytest.raises(fm.NonFiniteError, match="level 'w': its cost is nan"):
        fast.step(state, {"w": (X * torch.nan, Y)})
    with pytest.raises(fm.DefinitionError, match=r"compile\(unroll='all'\): expected 'step' or 'whole'"):
        written.compile(unroll="all")
