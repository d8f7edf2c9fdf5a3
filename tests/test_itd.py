"""The ways through an inner loop: one derivative, whatever is kept of the run and in whichever mode it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchopt
from hypothesis import given
from hypothesis import strategies as st

import funcmlo as fm
from funcmlo import _tree
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, finite_difference
from tests.registry import ESTIMATORS, OPTIMIZERS, quadratic, solved, structures, vector_like

WAYS: dict[str, fm.BestResponse] = {
    "recompute": fm.ITD(memory="recompute"),
    "recompute on the CPU": fm.ITD(memory="recompute", offload=True),
    "mixed": fm.ITD(memory="mixed"),
    "mixed on the CPU": fm.ITD(memory="mixed", offload=True),
    "checkpoint": fm.ITD(memory=fm.Checkpoint()),
    "binary": fm.ITD(memory=fm.Checkpoint(arity=2)),
    "ternary, mixed, on the CPU": fm.ITD(memory=fm.Checkpoint(arity=3, mixed=True), offload=True),
    "forward": fm.ITD(mode="forward"),
    "forward in chunks": fm.ITD(mode="forward", chunk=2),
    "a window as long as the loop": fm.ITD(window=7),
    "a longer window": fm.ITD(window=100, memory=fm.Checkpoint()),
    "a longer window, forward": fm.ITD(window=100, mode="forward"),
}
# Reordered sums of a few dozen float64 products on problems of condition ten or so.
ROUNDING = 1e-11


def network(y, x, log_decay, batch):
    """A small net with dropout, weighted examples and a learned decay."""
    inputs, labels, index = batch
    hidden = F.dropout(torch.tanh(inputs @ y["w"] + y["b"]), 0.3)
    losses = (hidden @ y["out"] - labels) ** 2
    decay = torch.exp(log_decay) * sum((leaf**2).sum() for leaf in y.values())
    return (torch.sigmoid(x[index]) * losses).mean() + decay


def validation(x, log_decay, y):
    return (torch.tanh(y["w"].sum(0) + y["b"]) @ y["out"] - 1.0) ** 2 + 0.01 * (x**2).sum() + log_decay**2


def hypergradient(response: fm.BestResponse, optimizer: object, seed: int = 0, steps: int = 7, of: str = "x") -> object:
    data = vector_like(torch.zeros(20, 4).double(), 1)

    def batch(t: int) -> object:
        index = torch.arange(5) + 5 * (t % 4)
        return data[index, :3], data[index, 3], index

    program = fm.Multilevel(
        fm.Level("y", network, optimizer, steps=steps, response=response),
        fm.Level(
            "log_decay", lambda log_decay, y: log_decay**2 + (y["b"] ** 2).sum(), torchopt.sgd(0.1), response=fm.SAMA()
        ),
        fm.Level("x", validation, torchopt.sgd(0.1)),
    )
    shapes = {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2).double(), "out": torch.zeros(2).double()}
    start = {"y": _tree.scale(0.5, vector_like(shapes, seed)), "log_decay": torch.tensor(-3.0).double()}
    state = program.init({**start, "x": vector_like(torch.zeros(20).double(), seed + 1)}, seed=seed)
    return program.hypergradient(state, {"y": batch}, of=of)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:composition=")
def test_every_way_is_the_stored_one(way: str, optimizer: str) -> None:
    # Dropout, another batch in each step, two upper levels' inputs.
    stored = hypergradient(fm.ITD(), OPTIMIZERS[optimizer](), seed=2)
    assert_agrees(hypergradient(WAYS[way], OPTIMIZERS[optimizer](), seed=2), ravel(stored), relative=ROUNDING)


@pytest.mark.parametrize("way", ["recompute", "checkpoint", "binary"])
@pytest.mark.filterwarnings("ignore:composition=")
def test_a_run_made_again_is_the_same_to_the_bit(way: str) -> None:
    # The same graph is walked step by step, so not even the order of the sums differs.
    adam = torchopt.adam(0.05)
    assert bits(hypergradient(WAYS[way], adam, of="log_decay")) == bits(hypergradient(fm.ITD(), adam, of="log_decay"))


@given(params=structures(), x=structures(), seed=st.integers(0, 2**20), steps=st.integers(1, 6))
@pytest.mark.parametrize("way", ["recompute on the CPU", "mixed", "binary", "forward"])
def test_on_random_trees(way: str, params: object, x: object, seed: int, steps: int) -> None:
    problem = quadratic(params, {"x": x}, seed)
    v = vector_like(params, seed + 1)
    momentum = torchopt.sgd(0.3, momentum=0.5)

    def answer(response: fm.BestResponse) -> object:
        at = solved(problem.loss, problem.params, problem.inputs, response, momentum, steps)
        return response.vjp(at, v, None)[0]

    stored, found = answer(fm.ITD()), answer(WAYS[way])
    assert _tree.mismatch(stored, found) is None
    assert_agrees(found, ravel(stored), relative=ROUNDING)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 16, 17])
@pytest.mark.parametrize("arity", [None, 2, 3, 5])
def test_every_length_of_the_loop(arity: int | None, steps: int) -> None:
    problem = quadratic(torch.zeros(3).double(), {"x": torch.zeros(2).double()}, seed=1)
    v = vector_like(torch.zeros(3).double(), 2)
    for window in (None, 1, 4):
        stored, found = (
            response.vjp(solved(problem.loss, problem.params, problem.inputs, response, steps=steps), v, None)
            for response in (fm.ITD(window=window), fm.ITD(window=window, memory=fm.Checkpoint(arity=arity)))
        )
        assert torch.allclose(found[0]["x"], stored[0]["x"], rtol=1e-12)
        assert found[2].steps == stored[2].steps == min(steps, window or steps)


@pytest.mark.parametrize("window", [1, 3, 10])
def test_what_a_window_leaves_out_decays_at_the_rate_of_the_steps(window: int) -> None:
    # y_{t+1} = y_t − a (y_t − x) has dy_T/dx = 1 − (1 − a)^T, and 1 − (1 − a)^K through the last K steps.
    a, x, ones = 0.3, torch.ones(2).double(), torch.ones(2).double()
    for memory in ("store", "recompute", fm.Checkpoint()):
        response = fm.ITD(window=window, memory=memory)
        at = solved(lambda y, i: ((y - i["x"]) ** 2).sum() / 2, 0 * x, {"x": x}, response, torchopt.sgd(a), 50)
        answers, _, stats = response.vjp(at, ones, None)
        assert torch.allclose(answers["x"], (1 - (1 - a) ** window) * ones, rtol=1e-13)
        assert stats.steps == window


@pytest.mark.filterwarnings("ignore:level 'y' reads 'x', but the gradient of its cost does not depend on it")
@pytest.mark.parametrize("way", [*WAYS, "a short window"])
def test_where_the_loop_begins_is_differentiated_by(way: str) -> None:
    # MAML: y_T from x itself; a window ends before it gets there.
    response = WAYS.get(way, fm.ITD(window=3))
    a = torch.tensor([0.2, 0.7]).double()

    def answer(response: fm.BestResponse) -> torch.Tensor:
        program = fm.Multilevel(
            fm.Level(
                "y", lambda y, x: (a * y**2).sum() / 2, torchopt.sgd(0.5), steps=7, response=response, init=lambda x: 2 * x
            ),
            fm.Level("x", lambda x, y: (y**3).sum(), torchopt.sgd(0.1)),
        )
        return program.hypergradient(program.init({"x": torch.ones(2).double()}), {}, of="x")

    shrunk = (1 - 0.5 * a) ** 7
    expected = torch.zeros(2).double() if way == "a short window" else 3 * (2 * shrunk) ** 2 * 2 * shrunk
    assert torch.allclose(answer(response), expected, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:composition=")
@pytest.mark.parametrize("way", WAYS)
def test_at_a_level_between_others(way: str) -> None:
    # The middle level's gradient has a part from below, and its inputs move from step to step.
    def program(response: fm.BestResponse) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("z", lambda z, y: ((z - torch.sin(y)) ** 2).sum(), torchopt.sgd(0.4), steps=3, response=fm.ITD()),
            fm.Level(
                "y", lambda y, z, x: ((y - x) ** 2).sum() + (z * y).sum(), torchopt.adam(0.1), steps=7, response=response
            ),
            fm.Level("x", lambda x, y: torch.cos(y).sum(), torchopt.sgd(0.1)),
        )

    start = {name: vector_like(torch.zeros(3).double(), i) for i, name in enumerate("zyx")}
    stored, other = program(fm.ITD()), program(WAYS[way])
    state, after = stored.init(start), other.init(start)
    for _ in range(2):
        assert_agrees(other.hypergradient(after, {}, of="x"), stored.hypergradient(state, {}, of="x"), relative=ROUNDING)
        state, after = stored.step(state, {})[0], other.step(after, {})[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("by", ["input", "init"])
def test_in_ordinary_code(way: str, by: str) -> None:
    init, x = (vector_like(torch.zeros(3).double(), i) for i in (1, 2))
    solve = fm.argmin(lambda y, x: (torch.exp(y) - x * y).sum(), torchopt.adam(0.1), steps=7, response=WAYS[way])

    def f(at: torch.Tensor) -> torch.Tensor:
        return (solve(init, at) ** 3).sum() if by == "input" else (solve(at, x) ** 3).sum()

    at = x if by == "input" else init
    if by == "init" and WAYS[way].window is not None and WAYS[way].window < 7:
        return
    reference, error = finite_difference(f, at)
    assert_agrees(torch.func.grad(f)(at), reference, error, relative=1e-7)
    leaf = at.clone().requires_grad_()
    assert_agrees(torch.autograd.grad(f(leaf), leaf)[0], reference, error, relative=1e-7)
    assert_agrees(torch.vmap(torch.func.grad(f))(torch.stack([at, at]))[1], reference, error, relative=1e-7)


@pytest.mark.parametrize("way", ["recompute", "checkpoint", "forward", "a window as long as the loop"])
def test_iterations_of_a_map(way: str) -> None:
    settle = fm.fixed_point(lambda y, x: 0.4 * torch.sin(y) + x, steps=7, response=WAYS[way])
    stored = fm.fixed_point(lambda y, x: 0.4 * torch.sin(y) + x, steps=7, response=fm.ITD())
    x, init = torch.tensor([0.3, -1.0]).double(), torch.ones(2).double()
    for which in (0, 1):
        found, reference = (
            torch.func.grad(lambda i, x, s=s: (s(i, x) ** 2).sum(), argnums=which)(init, x) for s in (settle, stored)
        )
        assert torch.allclose(found, reference, rtol=1e-12)
    mixed = fm.fixed_point(lambda y, x: 0.4 * torch.sin(y) + x, steps=7, response=fm.ITD(memory="mixed"))
    with pytest.raises(fm.EstimatorError, match="a fixed point has not; use memory='recompute'"):
        torch.func.grad(lambda x: mixed(init, x).sum())(x)


@pytest.mark.parametrize(
    "response", [fm.ITD(mode="forward"), fm.ITD(memory="mixed"), fm.AID(fm.CG(2), curvature=fm.Hessian("forward"))]
)
def test_an_operation_without_a_forward_derivative_is_named(response: fm.BestResponse) -> None:
    def loss(y: torch.Tensor, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cdist(y[None] * x["x"], torch.ones(1, 2)).sum()

    at = solved(loss, torch.zeros(2), {"x": torch.ones(2)}, response, steps=1)
    with pytest.raises(fm.EstimatorError, match=r"no forward-mode derivative \(.*cdist.*use what takes none: ITD\(\)"):
        response.vjp(at, torch.ones(2), None)


@pytest.mark.parametrize("way", [name for name in ESTIMATORS if name.startswith("itd")])
def test_without_steps_there_is_nothing_to_differentiate(way: str) -> None:
    at = solved(lambda y, i: (y - i["x"]).sum(), torch.ones(2), {"x": torch.ones(2)}, fm.AID(fm.Direct()))
    with pytest.raises(fm.EstimatorError, match="none were made"):
        ESTIMATORS[way](1.0, 2).vjp(at, torch.ones(2), None)
