"""`probe` says what works of a loss: a table of losses with what is known of them, silent faults, and wrong use."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcmlo as fm
from funcmlo._probe import probe
from funcmlo.probing import agreement
from funcmlo.probing.outcome import Probe
from funcmlo.probing.watching import bare

D = torch.float64
call = torch.func.functional_call


def draw(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def made(module: nn.Module, dtype: torch.dtype = D) -> nn.Module:
    """A module with weights that are the same wherever a test runs."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return module.to(dtype)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


class Cube(torch.autograd.Function):
    """x³, as torch asks for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * t


class NoRules(torch.autograd.Function):
    """x³ without rules for forward mode and vmap."""

    forward, setup_context, backward = Cube.forward, Cube.setup_context, Cube.backward


class OnceCube(NoRules):
    """x³ whose backward is not differentiated."""

    generate_vmap_rule = True
    backward = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class CutCube(NoRules):
    """x³ whose backward leaves the graph."""

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * g


class WrongCube(NoRules):
    """x³ with another function's derivative."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * g


class NarrowCube(NoRules):
    """x³ that loses its second derivative in float32 only."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * (x if x.dtype == D else x.detach()) ** 2 * g


class OldCube(torch.autograd.Function):
    """x³ in the style before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


P = torch.tensor([0.7, -1.3, 0.4], dtype=D)
Q, X = draw(1, 2, 4, 8), draw(2, 5, 8)
LSTM, GRU = made(nn.LSTM(3, 4, batch_first=True)), made(nn.GRU(3, 4, batch_first=True))
LSTM32 = made(nn.LSTM(3, 4, batch_first=True), torch.float32)
LAYER = made(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True))
CONV = made(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)))
NORM = made(nn.BatchNorm1d(3))
MLP = fm.Stateless(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1)))


def attention(p: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(Q * p[0], Q + p[1], Q * p[2]).square().sum()


def within(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
    def loss(p: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(p)

    return loss


def in_place(p: Tensor) -> Tensor:
    z = torch.zeros(3, dtype=D)
    z[0], z[1:] = p[0] ** 2, p[1:] ** 3
    return z.sum()


def branch(p: Tensor) -> Tensor:
    return p.pow(4).sum() if p.sum() > -100 else p.sum()


def item(p: Tensor) -> Tensor:
    return p.pow(4).sum() if p.sum().item() > -100 else p.sum()


def no_grad(p: Tensor) -> Tensor:
    with torch.no_grad():
        scale = p.square().sum()
    return scale * p.square().sum()


def hidden(p: Tensor) -> Tensor:
    with torch.no_grad():
        return p.square().sum()


def own_generator(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda p: (p.pow(4) * torch.randn(3, generator=generator, dtype=D).square()).sum()


def ctc(p: Tensor) -> Tensor:
    return F.ctc_loss(
        F.log_softmax(p.view(3, 1, 1) * draw(3, 1, 4), -1), torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1])
    )


SECOND = {"grad_of_grad", "func_grad_of_grad"}
MAPS = {"vmap_of_grad", "vmap_of_hvp"}
MATH, GRADIENTS = r"sdpa_kernel\(torch\.nn\.attention\.SDPBackend\.MATH\)", r"FiniteDifference\(\)"
FUNC = r"plain autograd does"


@dataclass
class Loss:
    """A loss, the questions that it fails, and what is said of one of them."""

    name: str
    function: Callable[..., Any]
    fails: set[str]
    about: str = ""
    operation: str | None = None
    remedy: str | None = None
    at: Any = None


TABLE = [
    Loss("quartic", lambda p: p.pow(4).sum(), set()),
    Loss("linear", lambda p: p.sum(), set()),
    Loss("metrics", lambda p: (p.pow(3).sum(), {"size": p.norm()}), set()),
    Loss("lstm", lambda w: call(LSTM, w, (draw(2, 5, 3),))[0].square().sum(), set(), at=weights(LSTM)),
    Loss("gru", lambda w: call(GRU, w, (draw(2, 5, 3),))[0].square().sum(), set(), at=weights(GRU)),
    Loss("conv, max_pool", lambda w: call(CONV, w, (draw(2, 1, 6, 6),)).square().sum(), set(), at=weights(CONV)),
    Loss("gather", lambda p: (p[torch.tensor([0, 2])] ** 3).sum() + p.gather(0, torch.tensor([1, 1])).pow(2).sum(), set()),
    Loss("embedding", lambda p: F.embedding(torch.tensor([0, 1, 1]), p.view(3, 1)).pow(3).sum(), set()),
    Loss("sort", lambda p: (p.sort().values.pow(3) * torch.arange(3)).sum(), set()),
    Loss("cumprod", lambda p: p.cumprod(0).sum(), set()),
    Loss("cross entropy", lambda p: F.cross_entropy(p[None], torch.tensor([1])), set()),
    Loss("custom Function", lambda p: Cube.apply(p).sum(), set()),
    Loss("attention in MATH", within(SDPBackend.MATH), set()),
    Loss(
        "dropout",
        lambda p: F.dropout(p.pow(4), 0.5).sum(),
        set(),
        "vmap_of_grad",
        r"functional\.dropout",
        "randomness='same'",
    ),
    Loss(
        "transformer layer with dropout",
        lambda w: call(LAYER, w, (X,)).pow(3).sum(),
        set(),
        "vmap_of_hvp",
        r"multi_head_attention|dropout",
        "randomness",
        at=weights(LAYER),
    ),
    Loss(
        "lstm in float32",
        lambda w: call(LSTM32, w, (draw(2, 5, 3).to(w["weight_ih_l0"].dtype),))[0].square().sum(),
        {"jvp_of_grad"},
        "jvp_of_grad",
        r"torch\.lstm \(aten::mkldnn_rnn_layer\)",
        r"mkldnn\.flags\(enabled=False\)",
        at=weights(LSTM32),
    ),
    Loss(
        "attention",
        attention,
        SECOND | {"jvp_of_grad"},
        "grad_of_grad",
        r"torch\.nn\.functional\.scaled_dot_product_attention \(aten::_scaled_dot_product_flash_attention_\w+_backward\)",
        MATH,
    ),
    Loss(
        "attention, fused",
        within(SDPBackend.FLASH_ATTENTION),
        SECOND | {"jvp_of_grad"},
        "jvp_of_grad",
        r"scaled_dot_product_attention \(aten",
        MATH,
    ),
    Loss(
        "attention without a kernel", within(SDPBackend.EFFICIENT_ATTENTION), {"value"}, "value", "scaled_dot_product", MATH
    ),
    Loss(
        "cdist",
        lambda p: torch.cdist(p.view(3, 1), draw(4, 1)).sum(),
        SECOND | {"jvp_of_grad"},
        "grad_of_grad",
        r"torch\.cdist \(aten::_cdist_backward\)",
        "vector_norm.*" + GRADIENTS,
    ),
    Loss(
        "pdist",
        lambda p: F.pdist(p.view(3, 1)).pow(2).sum(),
        SECOND | {"jvp_of_grad"},
        "jvp_of_grad",
        r"functional\.pdist \(aten::_pdist_forward\)",
        "vector_norm",
    ),
    Loss("ctc", ctc, SECOND | {"jvp_of_grad"}, "grad_of_grad", r"ctc_loss \(aten::_ctc_loss_backward\)", GRADIENTS),
    Loss(
        "embedding_bag",
        lambda p: F.embedding_bag(torch.tensor([[0, 1]]), p.view(3, 1)).pow(3).sum(),
        SECOND | {"jvp_of_grad"},
        "grad_of_grad",
        r"embedding_bag \(aten::_embedding_bag_backward\)",
        r"functional\.embedding\(",
    ),
    Loss(
        "grid_sample",
        lambda p: F.grid_sample(Q[:, :1] * p[0], torch.tanh(Q[..., :2] * p[1]), align_corners=False).square().sum(),
        {"jvp_of_grad"},
        "jvp_of_grad",
        r"grid_sample \(aten::grid_sampler_2d\)",
        r"reverse mode: ITD\(\)",
    ),
    Loss("unique", lambda p: torch.unique(p).pow(2).sum(), {"grad"}, "grad", r"torch\.unique"),
    Loss(
        "once_differentiable",
        lambda p: OnceCube.apply(p).sum(),
        SECOND | {"jvp_of_grad"},
        "grad_of_grad",
        "OnceCube.*once",
        "back",
    ),
    Loss(
        "detach in backward",
        lambda p: CutCube.apply(p).sum(),
        SECOND | {"jvp_of_grad"},
        "grad_of_grad",
        "CutCube",
        "backward",
    ),
    Loss(
        "wrong backward",
        lambda p: WrongCube.apply(p).sum(),
        {"consistent", "jvp_of_grad", *MAPS},
        "consistent",
        "WrongCube",
        "write the Function's backward",
    ),
    Loss(
        "no second derivative in float32",
        lambda p: NarrowCube.apply(p).sum(),
        SECOND | {"jvp_of_grad", "vmap_of_grad"},
        "grad_of_grad",
        "NarrowCube",
        at=P.float(),
    ),
    Loss(
        "no vmap rule",
        lambda p: NoRules.apply(p).sum(),
        {"jvp_of_grad", *MAPS},
        "vmap_of_grad",
        "NoRules",
        "generate_vmap_rule",
    ),
    Loss(
        "no jvp", lambda p: NoRules.apply(p).sum(), {"jvp_of_grad", *MAPS}, "jvp_of_grad", "NoRules", "its jvp staticmethod"
    ),
    Loss("old style", lambda p: OldCube.apply(p).sum(), {"func_grad"}, "func_grad", "OldCube", "setup_context.*" + FUNC),
    Loss(
        "data",
        lambda p: (p * p.data).sum(),
        {"consistent", "grad_of_grad"},
        "grad_of_grad",
        r"torch\.Tensor\.data \(test_",
        "data",
    ),
    Loss(
        "detach",
        lambda p: (p**2 * p.detach()).sum(),
        {"consistent", *SECOND, "jvp_of_grad"},
        "consistent",
        r"Tensor\.detach",
        "det",
    ),
    Loss("no_grad", no_grad, {"consistent", *SECOND}, "grad_of_grad", r"torch\.no_grad \(test_probe", "no_grad"),
    Loss("all under no_grad", hidden, {"grad", "consistent"}, "grad", r"torch\.no_grad", "graph"),
    Loss(
        "item of all",
        lambda p: torch.tensor(p.sum().item(), dtype=D),
        {"grad", "consistent"},
        "grad",
        r"Tensor\.item",
        "item",
    ),
    Loss("histc", lambda p: torch.histc(p, 3, -2, 2).square().sum(), {"grad"}, "grad", r"torch\.histc"),
    Loss(
        "numpy",
        lambda p: (p * torch.as_tensor(numpy.sin(p.detach().numpy()))).sum(),
        {"consistent", "func_grad", "grad_of_grad"},
        "func_grad",
        r"Tensor\.numpy",
        "compute with torch",
    ),
    Loss(
        "numpy at once", lambda p: torch.as_tensor(numpy.sin(p.numpy())).sum(), {"value"}, "value", r"Tensor\.numpy", "torch"
    ),
    Loss("in place", in_place, MAPS, "vmap_of_grad", r"__setitem__", r"torch\.where, torch\.stack"),
    Loss("branch", branch, MAPS, "vmap_of_grad", r"__bool__", r"torch\.where"),
    Loss("item", item, MAPS, "vmap_of_hvp", r"Tensor\.item", r"\.item\(\)"),
    Loss("mask", lambda p: p[p > 0].pow(3).sum(), MAPS, "vmap_of_grad", r"__getitem__", r"x\[mask\]"),
    Loss("norm at zero", lambda p: p.norm(), SECOND, "grad_of_grad", r"norm", "1e-12", at=torch.zeros(3, dtype=D)),
    Loss(
        "root at zero",
        lambda p: p.square().sum().sqrt(),
        {"grad"},
        "grad",
        r"PowBackward0",
        "1e-12",
        at=torch.zeros(3, dtype=D),
    ),
    Loss("no scalar", lambda p: p**2, {"value"}, "value", None, r"\.mean\(\) or \.sum\(\)"),
    Loss("complex", lambda p: torch.fft.fft(p).sum(), {"value"}, "value", None, r"\.real"),
    Loss("integer", lambda p: p.long().sum(), {"value"}, "value", None, "real floating"),
    Loss("a number", lambda p: float(p.sum()), {"value"}, "value", None, "0-d tensor"),
    Loss("a pair", lambda p: (p.sum(), p), {"value"}, "value", None, "dict of metrics"),
    Loss("infinite", lambda p: p.sum() / 0, {"value"}, "value", None, "parameters and the batch"),
    Loss("raises", lambda p: p @ torch.zeros(2, dtype=D), {"value"}, "value", "matmul"),
    Loss(
        "backward",
        lambda p: (p.pow(3).sum().backward(), p.pow(3).sum())[1],
        {"func_grad"},
        "func_grad",
        "backward",
        r"func\.grad",
    ),
    Loss(
        "numpy's generator",
        lambda p: numpy.random.rand() * p.pow(4).sum(),
        {"deterministic"},
        "deterministic",
        None,
        "batch",
    ),
    Loss(
        "own generator",
        own_generator(torch.Generator()),
        {"deterministic"},
        "deterministic",
        r"torch\.randn",
        "without generator=",
    ),
    Loss(
        "float32 inside",
        lambda p: p.float().pow(4).sum(),
        set(),
        "float64",
        r"Tensor\.float \(test_",
        r"params\.dtype",
    ),
    Loss(
        "float32 constant",
        lambda p: torch.ones(3) @ p.pow(3),
        set(),
        "float64",
        "matmul",
        "params.dtype",
        at=P.float(),
    ),
    Loss("at a kink", lambda p: p.relu().sum(), set(), "consistent", at=torch.zeros(3, dtype=D)),
    Loss("abs", lambda p: p.abs().pow(3).sum() + p.abs().sum(), set()),
    Loss("round", lambda p: p.round().sum(), set(), "grad"),
    Loss(
        "straight through",
        lambda p: (p + (p.round() - p).detach()).pow(2).sum(),
        {"consistent", *SECOND, "jvp_of_grad"},
        "consistent",
        "detach",
        "straight-through",
    ),
]


@pytest.mark.filterwarnings("ignore:.*non-writable")
@pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)
def test_each_loss(loss: Loss) -> None:
    found = probe(loss.function, P if loss.at is None else loss.at)
    assert set(found.failures) == loss.fails, str(found)
    assert found.works == bool(found) == (not loss.fails)
    if loss.about:
        answer = getattr(found, loss.about)
        assert answer.message
        if loss.operation is not None:
            assert re.search(loss.operation, answer.operation or ""), answer
        if loss.remedy is not None:
            assert re.search(loss.remedy, answer.remedy or ""), answer
    else:
        assert all(found.estimators.values()), found.advice
    assert all(o.ok is not True or o.number is None or o.number < 0.5 for o in found.outcomes)


def test_the_table_is_as_long_as_promised() -> None:
    assert len({loss.name for loss in TABLE}) == len(TABLE) >= 20


def test_a_silent_zero_is_measured() -> None:
    found = probe(lambda p: OnceCube.apply(p).sum(), P)
    assert found.grad_of_grad.number == pytest.approx(1.0, abs=1e-9)
    assert "zero" in found.grad_of_grad.message


def test_numbers_are_close_where_the_derivative_is_right() -> None:
    # Truncation: h²/6 · g''' of the gradient 4p³ along v, at the half step h/2 with h = ε^(1/3), all entries of order one.
    found = probe(lambda p: p.pow(4).sum(), P)
    assert 0 <= found.grad_of_grad.number < 1e-9
    assert found.jvp_of_grad.number == pytest.approx(found.grad_of_grad.number, abs=1e-12)


def test_a_silent_zero_is_found_among_kinks() -> None:
    """Two hundred thousand kinks, of which a step of the cube root of the precision meets some: a shorter one must do."""
    net = fm.Stateless(nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 1)))
    w, x = net.params(), draw(256, 64, dtype=torch.float32)
    w = {name: draw(*p.shape, dtype=torch.float32) / p.shape[-1] ** 0.5 for name, p in w.items()}
    whole = probe(lambda w, batch: net(w, batch).pow(3).mean(), w, batch=x)
    assert whole.works, str(whole)
    assert not set(whole.notes) & {"grad_of_grad", "jvp_of_grad"}
    cut = probe(lambda w, batch: OnceCube.apply(net(w, batch)).mean(), w, batch=x)
    assert {"grad_of_grad", "func_grad_of_grad"} <= set(cut.failures)
    assert cut.grad_of_grad.number > 0.01


def test_a_part_that_is_cut_is_named() -> None:
    params = {"deep": {"w": P}, "b": P * 2}
    found = probe(lambda q: q["b"].pow(3).sum() + CutCube.apply(q["deep"]["w"]).sum() * 1e-3, params)
    assert "['deep']['w']" in found.grad_of_grad.message
    assert "['b']" not in found.grad_of_grad.message


def test_a_part_whose_gradient_is_cut_is_named() -> None:
    found = probe(lambda q: q["b"].pow(3).sum() + (q["w"] * q["w"].detach()).sum(), {"w": P, "b": P * 2})
    assert "['w']" in found.consistent.message
    assert "['b']" not in found.consistent.message


def test_attention_inside_a_layer_has_its_name() -> None:
    layer = made(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    found = probe(lambda w: call(layer, w, (X,)).pow(3).sum(), weights(layer))
    assert found.grad_of_grad.operation.startswith("torch.nn.functional.scaled_dot_product_attention (aten::")
    direct = probe(attention, P)
    assert "reverse mode" not in direct.jvp_of_grad.remedy  # which fails, too


def test_a_cut_input_is_named() -> None:
    found = probe(lambda y, x, z: ((y - x.detach()) ** 2 + z * y).sum(), P, P * 2, z=P)
    assert "by x is not" in found.consistent.message
    assert "Tensor.detach" not in (found.consistent.operation or "")  # x does not require grad while the loss is listened to


def test_the_cross_derivative_is_checked() -> None:
    found = probe(lambda y, x: (y * OnceCube.apply(x)).sum(), P, P * 2)
    assert found.grad_of_grad.ok  # ∇²_xy v = 3x²v comes from the first derivative of the Function
    found = probe(lambda y, x: (OnceCube.apply(y * x)).sum(), P, P * 2)
    assert "x" in found.grad_of_grad.message


def test_inputs_are_mapped_over() -> None:
    found = probe(lambda y, x: y.square().sum() * (x if x.sum() > -100 else -x).sum(), P, x=P)
    assert set(found.failures) == {"vmap_inputs_of_grad", "vmap_inputs_of_hvp"}
    assert "vmap" in found.advice
    found = probe(lambda y, n, batch: (y[:n] * batch).sum(), P, 2, batch=torch.ones(2, dtype=D))
    assert found.vmap_inputs_of_grad.ok is None
    assert found.works


def test_wrong_maps_are_found() -> None:
    # The mean over everything mixes the copies of a map: a loss that looks below its own level.
    def loss(p: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(p) and str(p).count("Batched"):
            return 2 * p.pow(3).sum()
        return p.pow(3).sum()

    found = probe(loss, P)
    assert {"vmap_of_grad", "vmap_of_hvp"} == set(found.failures)
    assert "differ from a loop's" in found.vmap_of_grad.message


def test_a_gradient_that_torch_func_takes_otherwise() -> None:
    def loss(p: Tensor) -> Tensor:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(p)
        return (p**2 * (3.0 if wrapped else 1.0)).sum()

    found = probe(loss, P)
    assert set(found.failures) == {"func_grad"}
    assert found.func_grad.number == pytest.approx(2 / 3)


def test_in_place_on_what_comes_in() -> None:
    def inputs(p: Tensor, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        batch["count"] += 1
        return (p * x.mul_(2)).pow(2).sum()

    x, batch = P.clone(), {"count": torch.tensor(0)}
    found = probe(inputs, P, x, batch=batch)
    assert {"unchanged"} <= set(found.failures)
    assert "the input x" in found.unchanged.message
    assert "the batch" in found.unchanged.message
    assert "torch.Tensor.mul_" in found.unchanged.operation
    assert "clamp" in found.unchanged.remedy
    assert not any(found.estimators.values())
    assert torch.equal(x, P)
    assert batch["count"] == 0
    assert x._version == batch["count"]._version == 0  # not written to and put back: never written to

    params = P.clone()
    found = probe(lambda p: p.mul_(2).pow(2).sum(), params)
    assert set(found.failures) == {"value", "unchanged"}
    assert "the parameters" in found.unchanged.message
    assert torch.equal(params, P)


def test_buffers_are_seen_to_change_and_put_back() -> None:
    before = {name: b.clone() for name, b in NORM.named_buffers()}
    found = probe(lambda w: call(NORM, w, (draw(4, 3),)).pow(3).sum(), weights(NORM))
    assert set(found.failures) == {"unchanged", "func_grad"}  # torch.func refuses to write to what is captured
    assert "track_running_stats=False" in found.unchanged.remedy
    assert "module's buffer" in found.unchanged.message
    assert "batch_norm" in found.unchanged.operation
    assert all(torch.equal(b, before[name]) for name, b in NORM.named_buffers())


def test_what_the_loss_makes_itself_may_be_written_to() -> None:
    def loss(p: Tensor) -> Tensor:
        z = torch.tensor([1.0, 2.0, 3.0], dtype=D)
        z += 1
        count = torch.from_numpy(numpy.zeros(3))
        count += 1
        return (p.pow(3) * z * count).sum()

    assert probe(loss, P).unchanged.ok


def test_nothing_is_changed() -> None:
    generator, state = torch.get_rng_state(), (random.getstate(), numpy.random.get_state()[2])
    params = {"w": P.clone().requires_grad_()}

    def loss(p: dict[str, Tensor], batch: Tensor) -> Tensor:
        return (p["w"] * batch * torch.rand(3) * (numpy.random.rand() + random.random())).sum()

    found = probe(loss, params, batch=P)
    assert not found.deterministic.ok
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == state[0]
    assert numpy.random.get_state()[2] == state[1]
    assert params["w"].grad is None
    assert params["w"]._version == 0
    assert probe(loss, params, batch=P) is not None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert probe(lambda p: p.pow(3).sum(), P).works


def test_the_same_report_twice() -> None:
    def loss(p: Tensor) -> Tensor:
        return (p * p.data).sum() + torch.cdist(p.view(3, 1), draw(4, 1)).sum()

    assert str(probe(loss, P)) == str(probe(loss, P))


def test_a_loss_that_fails_late_is_reported() -> None:
    calls = iter(range(5))

    def loss(p: Tensor) -> Tensor:
        next(calls)
        return p.pow(3).sum()

    found = probe(loss, P)
    assert not found.works
    assert any("StopIteration" in (o.message or "") for o in found.failures.values())


def test_unused_parameters_are_noted() -> None:
    found = probe(lambda q: q["a"].pow(3).sum(), {"a": P, "b": P})
    assert found.works
    assert "['b']" in found.notes["grad"].message


def test_warnings_become_part_of_the_report() -> None:
    def loss(p: Tensor) -> Tensor:
        import warnings

        warnings.warn("mind the step", UserWarning, stacklevel=2)
        return p.pow(3).sum()

    found = probe(loss, P)
    assert found.warnings == ("mind the step",)
    assert "mind the step" in str(found)
    assert "mind the step" in found._repr_html_()


def test_float32_and_bfloat16() -> None:
    params = {name: p.float() for name, p in MLP.params().items()}
    x = draw(6, 3).float()
    assert probe(lambda w, batch: MLP(w, batch).square().mean(), params, batch=x).works
    found = probe(
        lambda w, batch: MLP(w, batch).square().mean(), {k: p.bfloat16() for k, p in params.items()}, batch=x.bfloat16()
    )
    assert found.grad_of_grad.ok


def test_it_takes_a_level_and_an_indexed_batch() -> None:
    import torchopt

    level = fm.Level("lower", lambda a, b, batch: ((a - b) * batch).pow(4).sum(), torchopt.sgd(0.1), reads={"b": "upper"})
    found = probe(level, P, upper=P * 2, batch=lambda t: torch.full((3,), t + 1.0, dtype=D))
    assert found.works
    assert found.loss == "lower"


def test_estimators_and_advice() -> None:
    flash = probe(attention, P)
    assert {name for name, usable in flash.estimators.items() if usable} == {
        "FiniteDifference()",
        "SAMA()",
        "Penalty()",
        "PerturbedSolve(…)",
        "AID(…, Hessian('finite_difference'))",
    }
    assert re.search(r"Use FiniteDifference\(\).*; not ITD\(\)", flash.advice)
    forward = probe(lambda p: NoRules.apply(p).sum(), P)
    assert forward.estimators["ITD()"]
    assert not forward.estimators["ITD(memory='mixed')"]
    assert probe(lambda p: p.pow(3).sum(), P).advice == "Every estimator can be used."
    assert "see deterministic" in probe(lambda p: numpy.random.rand() * p.sum(), P).advice
    assert "see consistent" in probe(lambda p: (p * p.data).sum(), P).advice
    assert "Not inside torch.func" in probe(lambda p: OldCube.apply(p).sum(), P).advice


def test_the_advice_holds() -> None:
    """What is advised against gives a wrong answer, and what is advised is right: y* = x with the curvature 6."""
    import torchopt

    def loss(y: Tensor, x: Tensor) -> Tensor:
        return (OnceCube.apply(y - x + 1) - 3 * (y - x)).sum()

    x = P.clone()
    found = probe(loss, x, x)
    assert found.estimators["AID(…, Hessian('finite_difference'))"]
    assert not found.estimators["AID(…, Hessian('kept'))"]

    def slope(curvature: fm.Hessian) -> Tensor:
        response = fm.AID(fm.CG(5), curvature)
        solve = fm.argmin(loss, torchopt.sgd(0.1), steps=0, response=response)
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(solve(x, at).sum(), at)
        return g

    # Central differences of a quadratic gradient are exact up to rounding, √ε of it at this step.
    torch.testing.assert_close(slope(fm.Hessian("finite_difference")), torch.ones_like(x), atol=1e-6, rtol=0)
    with pytest.raises(fm.EstimatorError, match="zero or negative curvature"):  # what is a zero to the solver
        slope(fm.Hessian("kept"))


def test_the_report_is_frozen_and_prints() -> None:
    found = probe(attention, P)
    with pytest.raises(FrozenInstanceError):
        found.loss = "other"  # type: ignore[misc]
    text = str(found)
    assert text.startswith("attention: 8 of 11 questions answered with yes")
    assert "grad_of_grad" in text
    assert "as grad_of_grad" in text
    assert found._repr_html_().count("<tr>") == len(found.outcomes)
    assert "&#x27;" in found._repr_html_()
    with pytest.raises(AttributeError, match="did you mean 'grad_of_grad'"):
        _ = found.grad_of_grd
    assert isinstance(found, Probe)
    assert not found.jvp_of_grad


def test_wrong_use() -> None:
    def loss(p: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        return (p * x * batch).sum()

    with pytest.raises(fm.ParameterError, match=r"'x' did not come; expected probe\(loss, params, x\)"):
        probe(loss, P, batch=P)
    with pytest.raises(fm.ParameterError, match="no input is called 'y'"):
        probe(loss, P, P, y=P, batch=P)
    with pytest.raises(fm.BatchError, match="takes a batch"):
        probe(loss, P, P)
    with pytest.raises(fm.BatchError, match="no argument batch"):
        probe(lambda p: p.sum(), P, batch=P)
    with pytest.raises(fm.ParameterError, match=r"dtype torch\.int64"):
        probe(lambda p: p.sum(), {"w": torch.arange(3)})
    with pytest.raises(fm.ParameterError, match=r"Sequential.*net\.params"):
        probe(lambda p: p.sum(), CONV)
    with pytest.raises(fm.ParameterError, match="holds no tensor"):
        probe(lambda p: p.sum(), {})
    with pytest.raises(fm.ParameterError, match="takes a loss first"):
        probe(P, P)  # type: ignore[arg-type]
    with pytest.raises(fm.DefinitionError, match="takes no positional argument"):
        probe(lambda: P.sum(), P)
    with pytest.raises(fm.EstimatorError, match=r"outside of torch\.func"):
        torch.func.grad(lambda p: probe(lambda q: q.sum(), p) and p.sum())(P)


def test_kernels_find_their_operations() -> None:
    assert bare("aten::_cdist_backward") == bare("aten::_cdist_forward") == "cdist"
    assert bare("LinalgVectorNormBackward0") == bare("aten::linalg_vector_norm")
    assert bare("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == bare(
        "aten::_scaled_dot_product_flash_attention_for_cpu"
    )


def test_differences_know_their_own_error() -> None:
    at, along, eps = [P], [torch.ones(3, dtype=D)], float(torch.finfo(D).eps)
    right = agreement.compare([3 * P**2], lambda x: [x[0] ** 3], at, along, eps)
    assert right.ok
    assert right.settled
    # One part in ten thousand is beyond what the differences' error (about h² = 4e-11) explains.
    assert not agreement.compare([3.0003 * P**2], lambda x: [x[0] ** 3], at, along, eps).ok
    zero = [torch.zeros(3, dtype=D)]
    kink = agreement.compare([torch.zeros(3, dtype=D)], lambda x: [x[0].relu()], zero, along, eps)
    assert kink.ok
    assert not kink.settled
    noisy = agreement.compare([3 * P**2], lambda x: [(x[0] ** 3).float().double()], at, along, eps)
    assert noisy.ok
    assert not noisy.settled or noisy.number < 0.1
