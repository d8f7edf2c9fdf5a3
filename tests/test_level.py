"""Levels: optimizers that read levels, and refusals of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo import _tree
from tests.oracles import assert_agrees, finite_difference
from tests.programs import SGD, lower, start, upper


@pytest.mark.parametrize("make", [lambda lr: torchopt.sgd(lr, momentum=0.9), torchopt.adam], ids=["momentum", "adam"])
def test_an_optimizer_that_reads_a_level_is_the_optimizer_itself(make: object) -> None:
    # torchopt's own momentum forgets its trace when it is made anew, as a function of levels is at every step.
    params = {"y": start()["y"], "x": {"at": start()["x"], "lr": torch.tensor(0.1, dtype=torch.float64)}}
    programs = [
        fm.Multilevel(
            fm.Level("y", lambda y, x: ((y - x["at"]) ** 2).sum(), optimizer, steps=4, response=fm.ITD()),
            fm.Level("x", lambda x, y: (y**2).sum(), SGD),
        )
        for optimizer in (make(0.1), lambda x: make(x["lr"]))
    ]
    fixed, read = (p.step(p.init(params), {})[0].params["y"] for p in programs)
    assert torch.allclose(read, fixed, rtol=1e-12)


def test_an_optimizer_that_reads_a_level_is_differentiated_like_any_other() -> None:
    p = fm.Multilevel(
        fm.Level(
            "y",
            lambda y, x: ((y - x["at"]) ** 2).sum(),
            lambda x: torchopt.chain(torchopt.clip.clip_grad_norm(0.3), torchopt.sgd(x["lr"])),
            steps=2,
            response=fm.ITD(),
        ),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), SGD),
    )
    state = p.init({"y": start()["y"], "x": {"at": start()["x"], "lr": torch.tensor(0.2).double()}})

    def value(x: object) -> torch.Tensor:
        return p.step(replace(state, params={**state.params, "x": x}), {})[1]["x"]["cost"]

    assert_agrees(p.hypergradient(state, {}, of="x"), *finite_difference(value, state.params["x"]))


def test_an_optimizer_alone_makes_an_edge() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y: (y**2).sum(), lambda x: torchopt.sgd(x), response=fm.ITD()),
        fm.Level("x", lambda x, y: y.sum(), SGD),
    )
    assert p.graph.u2l == (("x", "y"),)
    state = p.init({"y": torch.ones(2), "x": torch.tensor(0.1)})
    assert torch.allclose(p.hypergradient(state, {}, of="x"), torch.tensor(-4.0))  # y₁ = y₀ − 2x y₀


MORE_WRONG = {  # rows for the table of wrong uses
    "an optimizer that takes a batch": (
        lambda: fm.Level("y", lower, lambda batch: SGD),
        r"its optimizer reads a batch; only a loss or a solver can",
    ),
    "CG with a negative tolerance": (lambda: fm.CG(3, tol=-1.0), r"tol=-1.0.*not negative"),
    "the other reserved name": (lambda: fm.Level("buffers", lower, SGD), r"'buffers' is reserved"),
}


@pytest.mark.parametrize("use", MORE_WRONG)
def test_wrong_use_is_answered_by_name(use: str) -> None:
    wrong, message = MORE_WRONG[use]
    with pytest.raises(fm.DefinitionError, match=message):
        wrong()


def test_a_class_with_init_and_update_is_a_function_that_makes_an_optimizer() -> None:
    class Halving:
        def init(self, params):
            return ()

        def update(self, updates, state, *, params=None, inplace=True):
            return _tree.scale(-0.5, params), state

    p = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), Halving))
    assert torch.equal(p.step(p.init({"y": torch.ones(2)}), {})[0].params["y"], torch.full((2,), 0.5))


def test_reads_may_pass_over_a_constant() -> None:
    def cost(y, scale=2.0, x=None):
        return scale * ((y - x) ** 2).sum()

    p = fm.Multilevel(fm.Level("y", cost, SGD, reads={"x": "x"}), fm.Level("x", upper, SGD))
    state, _ = p.step(p.init(start()), {})
    assert torch.allclose(state.params["y"], start()["y"] - 0.4 * (start()["y"] - start()["x"]), rtol=1e-12)
