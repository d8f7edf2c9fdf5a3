"""The derivative of one step of the optimizer: OptimizerIdentity, SAMA, OneStep, for every optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree
from tests.oracles import assert_agrees, finite_difference
from tests.programs import Spy
from tests.registry import DIFFERENCE, OPTIMIZERS, solved
from tests.test_step_responses import Q, V, X, by_name, laid_out, loss

MORE = {
    "adamax": lambda: torchopt.adamax(0.05),
    "adagrad": lambda: torchopt.adagrad(0.1),
    "adadelta": lambda: torchopt.adadelta(0.5),
    "radam": lambda: torchopt.radam(0.05),
    "rmsprop, centred": lambda: torchopt.rmsprop(0.02, centered=True, momentum=0.9),
}
ALL = {**OPTIMIZERS, **MORE}


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", ALL)
def test_one_more_step_of_every_optimizer(name: str, steps: int) -> None:
    def curved(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["x"]
        return by_name(y, inputs) + torch.exp(x[0]) * (y**4).sum() / 4 + torch.sin(y).sum() * x[1]

    at = solved(curved, Q.params, Q.inputs, fm.AID(fm.OptimizerIdentity()), ALL[name](), steps=steps)

    def moved(x: Tensor) -> Tensor:
        return at.update(at.params, at.opt_state, {"x": x})[0]

    _, pull = torch.func.vjp(moved, X)
    exact = pull(V)[0]
    reference, error = finite_difference(lambda x: V @ moved(x).detach(), X, step=1e-3)
    assert_agrees(exact, reference, error + 1e-12, relative=1e-8)  # a detached moment would show here
    for response in (fm.AID(fm.OptimizerIdentity()), fm.AID(fm.Identity(), curvature="fixed_point")):
        assert_agrees(response.vjp(at, V, None)[0]["x"], exact, relative=1e-12, size=1e-2)
    size = V.norm() * torch.func.jacrev(lambda x: at.loss(at.params, {"x": x}))(X).norm()
    assert_agrees(fm.SAMA().vjp(at, V, None)[0]["x"], exact, relative=DIFFERENCE, size=size)
    if not steps:
        assert_agrees(fm.OneStep().vjp(at, V, None)[0]["x"], exact, relative=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_parameter_without_a_gradient_stays_out_of_it(name: str) -> None:
    inputs = {"x": X, "dead": torch.ones(2).double()}

    def alive(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return by_name(y, inputs) + (inputs["dead"] ** 2).sum()

    def with_dead(y: list[Tensor], inputs: dict[str, Tensor]) -> Tensor:
        return alive(y[0], inputs) + 0.0 * (y[1] * inputs["dead"]).sum()

    dead, one = torch.tensor([0.7, 0.0]).double(), torch.ones(2).double()
    for response in (
        fm.AID(fm.OptimizerIdentity()),
        fm.OneStep(),
        fm.AID(fm.Identity(), curvature="fixed_point"),
        fm.SAMA(),
    ):
        by_difference = isinstance(response, fm.SAMA)
        for steps in (0, 4):
            at = solved(with_dead, [Q.params, dead], inputs, response, ALL[name](), steps=steps)
            plain = response.vjp(solved(alive, Q.params, inputs, response, ALL[name](), steps=steps), V, None)[0]
            # Adam weighs what never had a gradient by rate/ε = 5e6, which a difference along w would feel.
            answers = response.vjp(at, [V, 0.0 * one if by_difference else one], None)[0]
            relative, size = (DIFFERENCE, 0.1) if by_difference else (1e-12, 0.0)
            assert_agrees(answers["x"], plain["x"], relative=relative, size=size)
            assert answers["dead"].abs().max() <= 1e-6 if by_difference else not answers["dead"].any()
            assert _tree.finite(response.vjp(at, [V, one], None)[0])
            assert torch.isfinite(laid_out(fm.FixedPoint(), at)).all()


@pytest.mark.parametrize("project", [None, lambda y: y.clamp(-0.5, 0.5)], ids=["free", "box"])
@pytest.mark.parametrize("name", ALL)
def test_one_step_is_a_window_of_one(name: str, project: Callable[[Tensor], Tensor] | None) -> None:
    def noisy(y, x, batch):
        return loss(y, x) + (torch.exp(x[0]) * batch * y**4).sum() / 4 + (torch.rand(3) * y).sum() * x[1]

    def gradient(response: fm.BestResponse) -> Tensor:
        program = fm.Multilevel(
            fm.Level("y", noisy, ALL[name](), steps=5, response=response, project=project),
            fm.Level("x", lambda x, y: torch.sin(y) @ V + (x**2).sum(), torchopt.sgd(0.1)),
        )
        state = program.init({"y": Q.params, "x": X}, seed=3)
        return program.hypergradient(state, {"y": lambda t: torch.tensor(0.1 * t).double()}, of="x")

    assert_agrees(gradient(fm.OneStep()), gradient(fm.ITD(window=1)), relative=1e-13)


RESPONSES = [fm.OneStep(), fm.AID(fm.Identity(), curvature="fixed_point")]


@pytest.mark.parametrize("response", RESPONSES, ids=["one step", "identity"])
def test_a_solution_from_elsewhere_is_taken_one_step_on_with_its_projection(response: fm.BestResponse) -> None:
    def box(y: Tensor, top: Tensor) -> Tensor:
        return torch.minimum(y, top)

    solve = fm.argmin(loss, torchopt.sgd(0.9), steps=0, response=response, project=box)
    top = torch.tensor(0.2).double()
    moved = torch.func.vjp(lambda x, top: box(Q.params - 0.9 * (Q.a @ Q.params - Q.b["x"] @ x), top), X, top)
    assert 0 < int((moved[0] == top).sum()) < 3
    answers = torch.func.grad(lambda x, top: V @ solve(Q.params, x, top), argnums=(0, 1))(X, top)
    for answer, expected in zip(answers, moved[1](V), strict=True):
        assert_agrees(answer, expected.reshape(-1), relative=1e-13)


@pytest.mark.filterwarnings("ignore:composition=")
def test_what_the_levels_below_add_to_the_gradient_is_that_of_the_last_step() -> None:
    spy = Spy()
    program = fm.Multilevel(
        fm.Level("z", lambda z, y: ((z - torch.sin(y)) ** 2).sum() / 2, torchopt.sgd(0.5), response=fm.AID(fm.CG(5))),
        fm.Level("y", lambda y, x, z: loss(y, x) + (y * z**2).sum(), torchopt.adam(0.3), steps=4, response=spy),
        fm.Level("x", lambda x, y: V @ y, torchopt.sgd(0.1)),
    )
    program.hypergradient(program.init({"z": Q.params, "y": Q.params, "x": X}), {}, of="x")
    (at,) = spy.seen
    # Adam's scaling depends on the whole gradient, what came through z included.
    exact = torch.func.vjp(lambda x: at.update(at.params, at.opt_state, {**at.inputs, "x": x})[0], X)[1](V)[0]
    for response in (fm.AID(fm.OptimizerIdentity()), RESPONSES[1]):
        assert_agrees(response.vjp(at, V, None)[0]["x"], exact, relative=1e-12)
    assert_agrees(fm.SAMA().vjp(at, V, None)[0]["x"], exact, relative=DIFFERENCE, size=0.1)
