"""Replayed inner steps come to what written ones do, and to nothing else when something has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from tests.oracles import bits
from tests.registry import ESTIMATORS

torch.manual_seed(0)
INPUTS, LABELS = torch.randn(30, 4, dtype=torch.float64), (torch.randn(30) > 0).double()
MODULE = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
NET = fm.Stateless(MODULE)
DROPPED = fm.Stateless(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.4), torch.nn.Linear(3, 1)).double())
DECAY = {"w": torch.tensor(-2.0, dtype=torch.float64)}


def loss(net: fm.Stateless) -> Callable[..., Any]:
    def cost(w: Any, decay: Any) -> Any:
        fit = F.binary_cross_entropy_with_logits(net(w, INPUTS).squeeze(-1), LABELS)
        return fit + decay["w"].exp() * sum((p**2).sum() for p in w.values()), {"fit": fit}

    return cost


def upper(decay: Any, w: Any) -> Tensor:
    return F.mse_loss(NET(w, INPUTS[:10]).squeeze(-1), LABELS[:10])


def program(
    response: fm.BestResponse, optimizer: Any = None, cost: Callable[..., Any] | None = None, **fields: Any
) -> fm.Multilevel:
    lower = fm.Level("w", cost or loss(NET), optimizer or torchopt.sgd(0.3), steps=12, response=response, **fields)
    return fm.Multilevel(lower, fm.Level("decay", upper, torchopt.adam(0.1)))


def begun(p: fm.Multilevel, net: fm.Stateless = NET) -> fm.State:
    return p.init({"w": net.params(), "decay": DECAY}, seed=4)


def tell(p: fm.Multilevel) -> str:
    return p.replayed()["w"]


OPTIMIZERS = {
    "sgd": lambda: torchopt.sgd(0.3),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: torchopt.adam(0.05),
    "rmsprop": lambda: torchopt.rmsprop(0.01),
    "learned": lambda: lambda decay: fm.optim.sgd(decay["w"].exp(), momentum=0.5),
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "learned"])  # AID does not see the rate
def test_parameters_are_the_same_to_the_bit(name: str) -> None:
    states = []
    for replay in (True, False):
        p = program(fm.AID(fm.CG(5)), OPTIMIZERS[name](), replay=replay)
        state = begun(p)
        for _ in range(3):
            state, metrics = p.step(state, {})
        states.append((
            state.params,
            state.optimizer,
            metrics["w"]["costs"],
            metrics["w"]["aux"],
            metrics["w"]["gradient_norm"],
        ))
        assert tell(p) == ("replayed" if replay else "not tried")
    assert bits(states[0]) == bits(states[1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_the_same_to_rounding(name: str) -> None:
    found, expected = (
        p.hypergradient(begun(p), {}, of="decay")["w"]
        for p in (program(fm.ITD(), OPTIMIZERS[name](), replay=replay) for replay in (True, False))
    )
    # Twelve steps of about a hundred operations each, in float64.
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_all_estimators_agree(name: str) -> None:
    found, expected = (
        p.hypergradient(begun(p), {}, of="decay")["w"]
        for p in (program(ESTIMATORS[name](0.3, 12), replay=replay) for replay in (True, False))
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_a_number_that_the_loss_closes_over_may_change() -> None:
    """At its start the decay has no gradient at all, so the first step cannot tell."""
    strength = [0.1]

    def cost(w: Tensor, decay: Tensor) -> Tensor:
        return ((w - 1) ** 2).sum() / 2 * 0.1 + strength[0] * (w**2).sum() * decay.exp()

    for response in (fm.ITD(), fm.AID(fm.CG(3))):
        made = []
        for replay in (True, False):
            p = fm.Multilevel(
                fm.Level("w", cost, torchopt.sgd(0.5), steps=9, response=response, replay=replay),
                fm.Level("decay", lambda decay, w: (w**2).sum(), torchopt.sgd(0.1)),
            )
            state = p.init({"w": torch.zeros(3).double(), "decay": torch.zeros(()).double()})
            answers = []
            for value in (0.1, 0.1, 0.7, 0.2):
                strength[0] = value
                answers.append(p.hypergradient(state, {}, of="decay"))
            made.append(torch.stack(answers))
        assert torch.allclose(*made, rtol=1e-13)
        assert made[0].unique().numel() == 3


def test_a_tensor_that_the_loss_closes_over_may_change() -> None:
    data = [torch.ones(3).double()]
    p = fm.Multilevel(
        fm.Level(
            "w", lambda w, x: ((w - data[0] * x) ** 2).sum() / 2, torchopt.sgd(1.0), steps=9, response=fm.AID(fm.CG(3))
        ),
        fm.Level("x", lambda x, w: w.sum(), torchopt.sgd(0.1)),
    )
    state = p.init({"w": torch.zeros(3).double(), "x": torch.ones(()).double()})
    for value in (1.0, 2.0, 5.0):
        data[0] = torch.full((3,), value).double()
        assert p.hypergradient(state, {}, of="x") == pytest.approx(3 * value)
        data[0].mul_(2)  # in place, too
        assert p.hypergradient(state, {}, of="x") == pytest.approx(6 * value)
    assert p.replayed()["w"] == "replayed"


def test_a_loss_that_prints_prints_at_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    def cost(w: Any, decay: Any) -> Any:
        print("step")
        return loss(NET)(w, decay)

    p = program(fm.AID(fm.Identity()), cost=cost)
    p.step(begun(p), {})
    assert capsys.readouterr().out.count("step") >= 12
    assert "print" in tell(p)


def test_a_loss_that_looks_at_a_value_is_made_as_it_is_written() -> None:
    def cost(w: Tensor, x: Tensor) -> Tensor:
        return ((w - x) ** 2).sum() if w.sum() < 1 else ((w + x) ** 2).sum()

    answers = []
    for replay in (True, False):
        p = fm.Multilevel(
            fm.Level("w", cost, torchopt.sgd(0.1), steps=20, response=fm.ITD(), replay=replay),
            fm.Level("x", lambda x, w: (w**2).sum(), torchopt.sgd(0.1)),
        )
        state = p.init({"w": torch.zeros(3), "x": torch.ones(3)})
        found = p.hypergradient(state, {}, of="x")
        answers.append(found)
        assert not replay or "reads a value" in p.replayed()["w"]
    assert bits(answers[0]) == bits(answers[1])


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(4))], ids=["itd", "cg"])
def test_dropout_draws_what_it_would(response: fm.BestResponse) -> None:
    def above(decay: Any, w: Any) -> Tensor:
        return F.mse_loss(DROPPED.eval()(w, INPUTS[:10]).squeeze(-1), LABELS[:10])

    found = []
    for replay in (True, False):
        lower = fm.Level("w", loss(DROPPED), torchopt.sgd(0.1), steps=9, response=response, replay=replay)
        p = fm.Multilevel(lower, fm.Level("decay", above, torchopt.sgd(0.1)))
        found.append(p.hypergradient(begun(p, DROPPED), {}, of="decay")["w"])
        assert p.replayed()["w"] == ("replayed" if replay else "not tried")
    assert torch.allclose(*found, rtol=1e-12)


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(4)), fm.ITD(memory="recompute")], ids=["itd", "cg", "again"])
def test_batches_may_differ_from_step_to_step_and_from_call_to_call(response: fm.BestResponse) -> None:
    def cost(w: Tensor, x: Tensor, batch: tuple[Tensor, float]) -> Tensor:
        return (batch[1] * (batch[0] @ w - x) ** 2).mean()

    def source(t: int) -> tuple[Tensor, float]:
        # The fifth batch is smaller, and a number changes: neither may be replayed as the others.
        return torch.linspace(0, 1 + t, 4 if t == 5 else 8).reshape(-1, 2).double(), 2.0 if t == 7 else 1.0

    fixed = [(torch.linspace(0, k, 8).reshape(4, 2).double(), 1.0) for k in (1, 2)]
    made = []
    for replay in (True, False):
        p = fm.Multilevel(
            fm.Level("w", cost, torchopt.sgd(0.01), steps=11, response=response, replay=replay),
            fm.Level("x", lambda x, w: w.sum(), torchopt.sgd(0.1)),
        )
        state = p.init({"w": torch.zeros(2).double(), "x": torch.ones(()).double()})
        made.append(
            torch.stack([p.hypergradient(state, {"w": batch}, of="x") for batch in (source, fixed[0], fixed[1], fixed[0])])
        )
    assert torch.allclose(*made, rtol=1e-12)


def test_tasks_are_replayed_together() -> None:
    targets = torch.linspace(1, 3, 15).reshape(5, 3).double()
    made = []
    for replay in (True, False):
        p = fm.Multilevel(
            fm.Level(
                "w",
                lambda w, x, batch: ((w - x * batch) ** 2).sum() / 2 + (w**4).sum() / 50,
                torchopt.sgd(0.2),
                steps=6,
                tasks=5,
                init=lambda x: x,
                response=fm.ITD(),
                replay=replay,
            ),
            fm.Level("x", lambda x, w: w.sin().sum(), torchopt.sgd(0.1)),
        )
        state = p.init({"x": torch.ones(3).double()})
        after, metrics = p.step(state, {"w": targets})
        assert p.replayed()["w"] == ("replayed" if replay else "not tried")
        gradient = p.hypergradient(state, {"w": targets}, of="x")
        made.append((gradient, after.params["w"], metrics["w"]["costs"], metrics["w"]["gradient_norm"]))
    for found, expected in zip(*made, strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-12)


def test_errors_say_which_step_even_where_nobody_asked_for_its_cost() -> None:
    p = fm.Multilevel(
        fm.Level("w", lambda w, x: ((w - x) ** 4).sum(), torchopt.sgd(10.0), steps=12, response=fm.ITD()),
        fm.Level("x", lambda x, w: w.sum(), torchopt.sgd(0.1)),
    )
    with pytest.raises(fm.NonFiniteError, match=r"level 'w': its cost is (inf|nan) at inner step \d+ of 12"):
        p.hypergradient(p.init({"w": torch.zeros(2), "x": torch.ones(2)}), {}, of="x")


def test_an_answer_that_is_differentiated_again_is_not_the_replayed_one() -> None:
    """Who hands in a cotangent that is recorded gets the steps as they are written."""
    seen: list[Any] = []

    class Spy(fm.ITD):
        def vjp(self, solved, cotangent, state):
            seen.append(solved)
            return super().vjp(solved, cotangent, state)

    p = fm.Multilevel(
        fm.Level("w", lambda w, x: ((w - x.sin()) ** 2).sum() / 2, torchopt.sgd(0.5), steps=8, response=Spy()),
        fm.Level("x", lambda x, w: (w**2).sum(), torchopt.sgd(0.1)),
    )
    x = torch.ones(2).double()
    p.step(p.init({"w": torch.zeros(2).double(), "x": x}), {})
    v = torch.ones(2).double().requires_grad_()
    with torch.enable_grad():
        product = seen[0].trajectory.pullback(v)["x"]
    assert torch.allclose(product, v * (1 - 0.5**8) * x.cos())
    (slope,) = torch.autograd.grad(product.sum(), v)
    assert torch.allclose(slope, (1 - 0.5**8) * x.cos())
    assert len(seen[0].trajectory.states) == 9
    assert bits(seen[0].trajectory.states[-1][0]) == bits(_tree.detach(seen[0].params))
