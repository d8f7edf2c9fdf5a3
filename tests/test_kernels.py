"""Kernels without second derivatives: attention by its formula where one is taken, errors that name what is missing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcmlo as fm
from funcmlo import kernels

F64 = torch.float64
GRADIENTS = {
    "finite difference": fm.FiniteDifference(),
    "sama": fm.SAMA(),
    "penalty": fm.Penalty(1e-3),
    "perturbed solve": fm.PerturbedSolve(2, chunk=1),
    "differences": fm.AID(fm.CG(5), curvature=fm.Hessian("finite_difference")),
    "damped differences": fm.AID(fm.CG(5), curvature=fm.Damped(0.1, fm.Hessian("finite_difference"))),
    "resampled differences": fm.AID(fm.Neumann(5), curvature=fm.Resampled(fm.Hessian("finite_difference"))),
    "identity": fm.AID(fm.Identity(), cross="finite_difference"),
    "optimizer identity": fm.AID(fm.OptimizerIdentity(), cross="finite_difference"),
}
MORE = {
    "itd": fm.ITD(),
    "mixed": fm.ITD(memory="mixed"),
    "itd forward": fm.ITD(mode="forward"),
    "cg": fm.AID(fm.CG(20)),
    "recompute": fm.AID(fm.CG(20), curvature=fm.Hessian("recompute")),
    "forward": fm.AID(fm.CG(20), curvature=fm.Hessian("forward")),
    "cross": fm.AID(fm.CG(5), cross="finite_difference"),
    "damped": fm.AID(fm.CG(5), curvature=fm.Damped(0.1)),
    "fixed point": fm.AID(fm.GMRES(20), curvature="fixed_point"),
    "identity": fm.AID(fm.Identity()),
    "one step": fm.OneStep(),
    "forward gradient": fm.ForwardGradient(2),
}


def attended(y: Tensor, x: Tensor) -> Tensor:
    """Attention of three heads of two tokens."""
    q, k, v = ((y * c + x).view(1, 3, 2, 2) for c in (1.0, 0.5, -0.3))
    return F.scaled_dot_product_attention(q, k, v).pow(2).sum() + ((y - x) ** 2).sum()


def program(loss: Callable[..., Tensor], response: fm.BestResponse, **upper: object) -> fm.Multilevel:
    return fm.Multilevel(
        fm.Level("y", loss, torchopt.sgd(0.1), steps=3, response=response),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1), **upper),
    )


def state(made: fm.Multilevel) -> fm.State:
    x = torch.linspace(-1, 1.2, 12, dtype=F64)
    return made.init({"y": x.flip(0) / 2, "x": x})


@pytest.mark.parametrize(("name", "response"), [*GRADIENTS.items(), *MORE.items()], ids=[*GRADIENTS, *MORE])
def test_estimators_say_what_they_take(name: str, response: fm.BestResponse) -> None:
    """Those that say they take gradients alone work on the fused kernel, and only they."""
    del name
    first_order = response in GRADIENTS.values()
    assert response.second_order is not first_order

    def fused(y: Tensor, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attended(y, x)

    made = program(fused, response)
    expected = (
        nullcontext()
        if first_order
        else pytest.raises(
            fm.EstimatorError,
            match=r"level 'y': .* takes .* derivatives of its cost, and aten::_scaled_dot_product_flash\w+ has none "
            r".*SDPBackend\.MATH",
        )
    )
    with expected:
        made.hypergradient(state(made), {}, of="x")


@pytest.mark.parametrize("name", [name for name in MORE if name not in {"forward gradient", "cross", "damped"}])
def test_attention_is_computed_by_its_formula(name: str) -> None:
    """The hypergradient is that of attention written out."""

    def written(y: Tensor, x: Tensor) -> Tensor:
        q, k, v = ((y * c + x).view(1, 3, 2, 2) for c in (1.0, 0.5, -0.3))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1)
        return (weights @ v).pow(2).sum() + ((y - x) ** 2).sum()

    found, known = (program(loss, MORE[name]) for loss in (attended, written))
    got, right = (made.hypergradient(state(made), {}, of="x") for made in (found, known))
    assert torch.allclose(got, right, rtol=1e-11, atol=1e-13)


def kernels_used(response: fm.BestResponse, **upper: object) -> dict[str, set[bool]]:
    """Whether the fused kernel was allowed when each level's cost was evaluated."""
    seen: dict[str, set[bool]] = {"y": set(), "x": set()}

    def low(y: Tensor, x: Tensor) -> Tensor:
        seen["y"].add(torch.backends.cuda.flash_sdp_enabled())
        return ((y - x) ** 2).sum()

    def up(x: Tensor, y: Tensor) -> Tensor:
        seen["x"].add(torch.backends.cuda.flash_sdp_enabled())
        return (y**2).sum()

    made = fm.Multilevel(
        fm.Level("y", low, torchopt.sgd(0.1), steps=2, response=response), fm.Level("x", up, torchopt.sgd(0.1), **upper)
    )
    made.step(state(made), {})
    return seen


def test_only_where_a_second_derivative_is_taken() -> None:
    """All evaluations of one level agree; a level above, whose cost has its gradient taken alone, keeps the fast kernel."""
    assert kernels_used(fm.AID(fm.CG(3))) == {"y": {False}, "x": {True}}
    assert kernels_used(fm.FiniteDifference()) == {"y": {True}, "x": {True}}
    one_of_two = fm.Level("y", attended, torchopt.sgd(0.1), response={"a": fm.FiniteDifference(), "b": fm.ITD()})
    assert one_of_two.second_order


def test_flags_are_put_back() -> None:
    flags = torch.backends.cuda

    def chosen() -> tuple[bool, ...]:
        return (
            flags.flash_sdp_enabled(),
            flags.mem_efficient_sdp_enabled(),
            flags.cudnn_sdp_enabled(),
            flags.math_sdp_enabled(),
        )

    before = chosen()
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        outside = chosen()
        with kernels.attention(formula=True):
            assert chosen() == (False, False, False, True)
            with kernels.attention(formula=True):
                pass
            assert chosen() == (False, False, False, True)
        assert chosen() == outside
        with pytest.raises(ZeroDivisionError), kernels.attention(formula=True):
            raise ZeroDivisionError
        assert chosen() == outside
        with kernels.attention(formula=False):
            assert chosen() == outside
    assert chosen() == before


class Cube(torch.autograd.Function):
    """x ↦ x³, whose backward pass is not differentiable."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2


def distances(y: Tensor, x: Tensor) -> Tensor:
    return torch.cdist((y * x).view(4, 3), x.view(4, 3)).sum() + (y**2).sum()


def bags(y: Tensor, x: Tensor) -> Tensor:
    return F.embedding_bag(torch.tensor([[0, 1]]), (y * x).view(4, 3)).pow(2).sum() + (y**2).sum()


def alignments(y: Tensor, x: Tensor) -> Tensor:
    logits = (y * x).view(4, 1, 3).log_softmax(-1)
    return F.ctc_loss(logits, torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])) + (y**2).sum()


def margins(y: Tensor, x: Tensor) -> Tensor:
    return F.multi_margin_loss((y * x).view(4, 3), torch.tensor([0, 1, 2, 0])) + (y**2).sum()


@pytest.mark.parametrize(
    ("loss", "operation", "way"),
    [
        (distances, "aten::_cdist_backward", r"Write distances out: .*; or take an estimator of gradients alone"),
        (bags, "aten::_embedding_bag_backward", r"torch.nn.functional.embedding\(index"),
        (alignments, "aten::_ctc_loss_backward", r"Take an estimator of gradients alone: FiniteDifference\(\)"),
        (margins, "aten::multi_margin_loss_backward", "Take an estimator of gradients alone"),
    ],
    ids=["cdist", "embedding_bag", "ctc_loss", "multi_margin_loss"],
)
def test_a_missing_second_derivative_is_named(loss: Callable[..., Tensor], operation: str, way: str) -> None:
    for response in (fm.ITD(), fm.ITD(memory="recompute"), fm.AID(fm.CG(5)), fm.OneStep()):
        made = program(loss, response)
        kind = type(response).__name__
        match = rf"level 'y': {kind}\(.*\) takes second derivatives of its cost, and {operation} has none .*{way}"
        with pytest.raises(fm.EstimatorError, match=match) as caught:
            made.hypergradient(state(made), {}, of="x")
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(fm.EstimatorError, match=match):
            made.step(state(made), {})
    made = program(loss, fm.FiniteDifference())
    assert made.hypergradient(state(made), {}, of="x").isfinite().all()


@pytest.mark.parametrize("response", [fm.ITD(memory="mixed"), fm.ForwardGradient(2), fm.ITD(mode="forward")], ids=repr)
def test_a_missing_forward_derivative_is_named(response: fm.BestResponse) -> None:
    made = program(distances, response)
    with pytest.raises(
        fm.EstimatorError, match=r"level 'y': .* takes forward-mode derivatives .* aten::_cdist_forward .*take reverse mode"
    ):
        made.hypergradient(state(made), {}, of="x")


def test_a_missing_derivative_in_a_backward_pass_is_named() -> None:
    x = torch.linspace(-1, 1.2, 12, dtype=F64).requires_grad_()
    solve = fm.argmin(distances, torchopt.sgd(0.1), steps=3, response=fm.AID(fm.CG(5)))
    with pytest.raises(fm.EstimatorError, match=r"argmin: AID\(CG\(5\)\) takes second derivatives .*_cdist_backward"):
        solve(x.detach().flip(0), x).sum().backward()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), kernels.naming("level 'y'", fm.ITD()):
        raise RuntimeError("shapes")
    with pytest.raises(fm.EstimatorError, match=r"^mine$"), kernels.naming("level 'y'", fm.ITD()):
        raise fm.EstimatorError("mine")
    match = r"level 'y': ITD\(\) takes second derivatives of its cost, and an operation in it has none"
    with pytest.raises(fm.EstimatorError, match=match), kernels.naming("level 'y'", fm.ITD()):
        raise RuntimeError("this kernel does not support double backward")


def cut_by_data(y: Tensor, x: Tensor) -> Tensor:
    return ((y - x.data) ** 2).sum()


def cut_by_no_grad(y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = 2 * x
    return ((y - target) ** 2).sum()


def cut_by_once(y: Tensor, x: Tensor) -> Tensor:
    return Cube.apply(y + x).sum() + (y**2).sum()


SILENT = "level 'y' reads 'x', but the gradient of its cost does not depend on it"


@pytest.mark.parametrize("loss", [cut_by_data, cut_by_no_grad, cut_by_once])
@pytest.mark.parametrize(
    "response", [fm.ITD(), fm.ITD(memory="recompute"), fm.AID(fm.CG(3)), fm.OneStep(), fm.FiniteDifference()], ids=repr
)
def test_a_cut_graph_is_told(loss: Callable[..., Tensor], response: fm.BestResponse) -> None:
    made = program(loss, response)
    if loss is cut_by_once and isinstance(response, fm.FiniteDifference):  # which needs no more than its first derivative
        assert made.hypergradient(state(made), {}, of="x").any()
        return
    with pytest.warns(fm.FuncmloWarning, match=SILENT):
        assert not made.hypergradient(state(made), {}, of="x").any()


@pytest.mark.parametrize(
    "response",
    [
        fm.ITD(),
        fm.ITD(memory="recompute"),
        fm.ITD(memory="mixed"),
        fm.ITD(mode="forward"),
        fm.ForwardGradient(2),
        fm.PerturbedSolve(2, chunk=1),
        fm.OneStep(),
        fm.AID(fm.CG(3)),
        fm.AID(fm.CG(3), curvature=fm.Hessian("forward")),
        fm.AID(fm.GMRES(3), curvature="fixed_point"),
    ],
    ids=repr,
)
def test_an_input_that_is_reached_in_any_way_is_not_told(response: fm.BestResponse) -> None:
    """By the cost, by the optimizer, by the start, by the projection."""
    y, x = (torch.linspace(a, 1.0, 3, dtype=F64) for a in (0.1, 0.2))
    made = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.1), steps=3, response=response),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    made.step(made.init({"y": y, "x": x}), {})  # any warning is an error
    if not response.follows_start:
        return
    for fields in (
        {"optimizer": lambda x: torchopt.sgd(x.mean() / 10)},
        {"optimizer": torchopt.sgd(0.1), "init": lambda x: 2 * x},
        {"optimizer": torchopt.sgd(0.1), "project": lambda y, x: y + x / 10},
    ):
        made = fm.Multilevel(
            fm.Level("y", lambda y: (y**4).sum(), steps=3, response=response, **fields),
            fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        )
        made.step(made.init({"y": y, "x": x}), {})


@pytest.mark.parametrize("response", [fm.ITD(), fm.AID(fm.CG(3)), fm.FiniteDifference()], ids=repr)
def test_of_several_inputs_the_right_one_is_told(response: fm.BestResponse) -> None:
    def cost(y: Tensor, b: dict[str, Tensor], a: Tensor) -> Tensor:
        return ((y - b["p"] * b["q"]) ** 2).sum() + (y * a.data).sum()

    with pytest.warns(fm.FuncmloWarning, match='composition="paths"'):
        made = fm.Multilevel(
            fm.Level("y", cost, torchopt.sgd(0.1), steps=3, response=response),
            fm.Level("b", lambda b, y: (y**2).sum(), torchopt.sgd(0.1)),
            fm.Level("a", lambda a, y: (y**2).sum(), torchopt.sgd(0.1)),
        )
    one = torch.ones(3, dtype=F64)
    begin = made.init({"y": one, "b": {"p": one, "q": one}, "a": one})
    assert made.hypergradient(begin, {}, of="b")["p"].any()  # any warning is an error
    with pytest.warns(fm.FuncmloWarning, match="level 'y' reads 'a', but the gradient"):
        made.hypergradient(begin, {}, of="a")
