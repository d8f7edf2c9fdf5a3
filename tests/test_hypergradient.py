"""Whole programs: hypergradients against central differences of the program itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import funcmlo as fm
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, finite_difference, is_fine
from tests.registry import OPTIMIZERS, vector_like


def value_of(program: fm.Multilevel, state: fm.State, batches: dict[str, object], level: str) -> object:
    """The upper cost after the inner steps, as a function of the upper parameters."""

    def value(params: object) -> torch.Tensor:
        moved = replace(state, params={**state.params, level: params})
        return program.step(moved, batches)[1][level]["cost"]

    return value


def net(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ params["w"] + params["b"]) @ params["out"]


def train_loss(net_params, weights, batch):
    x, y = batch
    return (torch.sigmoid(weights["examples"]) * (net(net_params, x) - y) ** 2).mean() + torch.exp(weights["decay"]) * sum(
        (leaf**2).sum() for leaf in net_params.values()
    )


def valid_loss(weights, net_params, batch):
    x, y = batch
    return ((net(net_params, x) - y) ** 2).mean() + 0.01 * (weights["examples"] ** 2).sum()


def small_net(seed: int) -> tuple[dict[str, object], dict[str, object]]:
    shapes = {"w": torch.zeros(2, 3), "b": torch.zeros(3), "out": torch.zeros(3)}
    own = vector_like({k: v.double() for k, v in shapes.items()}, seed)
    weights = {"examples": vector_like(torch.zeros(4).double(), seed + 1), "decay": torch.tensor(-3.0).double()}
    data = vector_like((torch.zeros(5, 4, 2).double(), torch.zeros(5, 4).double()), seed + 2)
    valid = vector_like((torch.zeros(6, 2).double(), torch.zeros(6).double()), seed + 3)
    # Another batch at every inner step, by its number.
    return {"net_params": own, "weights": weights}, {
        "net_params": lambda t: (data[0][t % 5], data[1][t % 5]),
        "weights": valid,
    }


@given(seed=st.integers(0, 2**20), steps=st.integers(1, 6))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_itd_is_the_derivative_of_the_unrolled_program(optimizer: str, seed: int, steps: int) -> None:
    program = fm.Multilevel(
        fm.Level("net_params", train_loss, OPTIMIZERS[optimizer](), steps=steps, response=fm.ITD()),
        fm.Level("weights", valid_loss, torchopt.sgd(0.1)),
    )
    params, batches = small_net(seed)
    state = program.init(params)
    # A step first, so that moments and schedules are under way.
    state, _ = program.step(state, batches)
    answer = program.hypergradient(state, batches, of="weights")
    reference, error = finite_difference(value_of(program, state, batches, "weights"), state.params["weights"])
    assume(is_fine(reference, error))  # rarely, a second moment near zero leaves nothing smooth to difference
    assert_agrees(answer, reference, error)


@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("solver", [fm.CG(40, tol=1e-14), fm.Direct(), fm.Neumann(40, scale=0.6)], ids=repr)
def test_aid_is_the_derivative_of_the_solved_program(solver: fm.LinearSolver, seed: int) -> None:
    # Ridge regression whose Hessian lies in [1.37, 1.88]: 25 steps of rate 0.6 leave 0.18^25 < 1e-18 of the start, so
    # the re-solved program's central difference is a reference; 40 Neumann terms leave as little.
    a = torch.linalg.qr(vector_like(torch.zeros(6, 4).double(), seed))[0] * torch.tensor([1.0, 0.9, 0.8, 0.7]).double()
    b, c = vector_like((torch.zeros(6).double(), torch.zeros(4).double()), seed + 1)

    def lower(y, x):
        return ((a @ y - b * x["targets"]) ** 2).sum() / 2 + torch.sigmoid(x["decay"]) * (y**2).sum() / 2

    def upper(x, y):
        return torch.sin(y - c).sum() + 0.1 * (x["targets"] ** 2).sum()

    program = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.6), steps=25, response=fm.AID(solver)),
        fm.Level("x", upper, torchopt.sgd(0.1)),
    )
    x = {"targets": vector_like(torch.zeros(6).double(), seed + 2), "decay": torch.tensor(2.0).double()}
    state = program.init({"y": torch.zeros(4).double(), "x": x})
    answer, stats = program.hypergradient(state, {}, of="x", with_stats=True)
    reference, error = finite_difference(value_of(program, state, {}, "x"), x)
    assert_agrees(answer, reference, error)
    assert stats["y"].converged
    assert stats["y"].hvps >= 1


class DeadNet(nn.Module):
    """A ReLU net with a dead unit and an embedding with rows that no example uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.hidden = nn.Linear(3, 4)
        self.out = nn.Linear(4, 1)
        with torch.no_grad():
            self.hidden.bias[0] = -100.0  # never active

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.embedding(tokens)))).squeeze(-1)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "clipped adam"])
def test_dead_units_and_unused_rows_give_finite_right_hypergradients(optimizer: str) -> None:
    torch.manual_seed(0)
    net = fm.Stateless(DeadNet().double())
    tokens, y = torch.tensor([0, 1, 2, 1]), torch.randn(4, dtype=torch.float64)

    def lower(own, weights):
        return (torch.sigmoid(weights) * (net(own, tokens) - y) ** 2).mean()

    def upper(weights, own):
        return F.mse_loss(net(own, tokens), y.flip(0))

    program = fm.Multilevel(
        fm.Level("own", lower, OPTIMIZERS[optimizer](), steps=4, response=fm.ITD()),
        fm.Level("weights", upper, torchopt.sgd(0.1)),
    )
    state = program.init({"own": net.params(), "weights": torch.zeros(4, dtype=torch.float64)})
    answer = program.hypergradient(state, {}, of="weights")
    # At the very first step Adam's update is m̂/(√v̂ + ε) = sign(g): its derivative is ε/(|g| + ε)² and the hypergradient
    # is all in the later steps; rows that are never used stay out of it, with derivative exactly 0.
    reference, error = finite_difference(value_of(program, state, {}, "weights"), state.params["weights"], step=1e-4)
    assert ravel(answer).abs().max() > 0
    assert_agrees(answer, reference, error, relative=1e-5)


def test_itd_follows_learned_learning_rates_and_starts() -> None:
    def lower(y, x):
        return ((y - x["target"]) ** 2).sum() / 2 + torch.cos(y).sum()

    program = fm.Multilevel(
        fm.Level(
            "y",
            lower,
            lambda x: torchopt.sgd(x["lr"], momentum=0.5),
            steps=3,
            response=fm.ITD(),
            init=lambda x: x["start"] * 2,
        ),
        fm.Level("x", lambda x, y: torch.sin(3 * y).sum(), torchopt.sgd(0.1)),
    )
    x = {"lr": torch.tensor(0.3), "target": torch.tensor([0.4, 1.0]), "start": torch.tensor([0.1, -0.2])}
    state = program.init({"x": {k: v.double() for k, v in x.items()}})
    assert torch.equal(state.params["y"], torch.tensor([0.2, -0.4]).to(torch.float32).double())
    reference, error = finite_difference(value_of(program, state, {}, "x"), state.params["x"])
    assert_agrees(program.hypergradient(state, {}, of="x"), reference, error)


@pytest.mark.parametrize("which", [0, 1])
def test_itd_follows_learned_betas(which: int) -> None:
    def lower(y):
        return (torch.tanh(y - 1.0) ** 2).sum() + 0.1 * (y**2).sum()

    def optimizer(x):
        betas = [0.9, 0.99]
        betas[which] = x["beta"]
        return torchopt.adam(0.1, betas=tuple(betas))

    program = fm.Multilevel(
        fm.Level("y", lower, optimizer, steps=4, response=fm.ITD()),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.tensor([0.3, -0.5]).double(), "x": {"beta": torch.tensor(0.8).double()}})
    reference, error = finite_difference(value_of(program, state, {}, "x"), state.params["x"])
    assert_agrees(program.hypergradient(state, {}, of="x"), reference, error)


def test_a_start_that_the_loss_reads_too_is_differentiated_once() -> None:
    # The loop starts at meta itself and the loss pulls back to it: ∂g/∂y must not see meta through y₀.
    # y₁ = m − r[(m − b) + λ(m − m)] and y₂ = y₁ − r[(y₁ − b) + λ(y₁ − m)].
    r, lam = 0.25, 2.0
    program = fm.Multilevel(
        fm.Level(
            "y",
            lambda y, meta: ((y - 3.0) ** 2).sum() / 2 + lam * ((y - meta) ** 2).sum() / 2,
            torchopt.sgd(r),
            steps=2,
            response=fm.ITD(),
            init=lambda meta: meta,
        ),
        fm.Level("meta", lambda meta, y: y.sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"meta": torch.tensor([1.0]).double()})
    slope = (1 - r) * (1 - r - r * lam) + r * lam
    assert torch.allclose(program.hypergradient(state, {}, of="meta"), torch.tensor([slope]).double(), rtol=1e-14)


def test_itd_through_an_active_projection() -> None:
    program = fm.Multilevel(
        fm.Level(
            "y",
            lambda y, x: ((y - x) ** 2).sum() / 2,
            torchopt.sgd(0.5),
            steps=3,
            response=fm.ITD(),
            project=lambda y: y.clamp(0.0, 1.0),
        ),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(2).double(), "x": torch.tensor([0.5, 4.0]).double()})
    grad = program.hypergradient(state, {}, of="x")
    reference, error = finite_difference(value_of(program, state, {}, "x"), state.params["x"])
    assert_agrees(grad, reference, error)
    assert grad[1] == 0.0  # held at 1, whatever x does


def test_stochastic_losses_repeat() -> None:
    def lower(y, x):
        return ((y - x) ** 2 * torch.rand(3, dtype=torch.float64)).sum()

    program = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.1), steps=4, response=fm.ITD()),
        fm.Level("x", lambda x, y: (y**2 * torch.rand(3, dtype=torch.float64)).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(3).double(), "x": torch.ones(3).double()}, seed=7)
    torch.manual_seed(3)
    first = program.hypergradient(state, {}, of="x")
    drawn = torch.rand(1)
    second = program.hypergradient(state, {}, of="x")
    assert bits(first) == bits(second)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn), "the default generator was left as it was found"
    reference, error = finite_difference(value_of(program, state, {}, "x"), state.params["x"])
    assert_agrees(first, reference, error)
    other = program.hypergradient(replace(state, seed=8), {}, of="x")
    assert bits(other) != bits(first)
