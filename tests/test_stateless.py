"""Modules as pure functions of parameters and buffers; the ordinary module is the reference, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, parametrize

import funcmlo as fm
from funcmlo.stateless import Stateless
from tests.oracles import bits, fingerprint

MODULES = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)), (4, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten()), (2, 1, 5, 5)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)), (4, 3)),
    "dropout in eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).eval(), (4, 3)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), (5, 1, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), (2, 3, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), (5, 3)),
    "batch norm in eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), (5, 3)),
    "a frozen norm in training": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Tanh()), (5, 3)),
    "cumulative": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh()), (5, 3)),
    "not affine": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh()), (5, 3)),
    "instance norm": (lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, track_running_stats=True)), (4, 1, 6)),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh()), (5, 3)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), (5, 3)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (5, 3)),
    "instance norm in eval": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, track_running_stats=True)).eval(),
        (4, 1, 6),
    ),
    "reassigned": (lambda: Average(), (5, 3)),
    "in place": (lambda: InPlace(), (5, 3)),
}
# torch's own, where it first meets forward mode
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
WRITING = {
    name: MODULES[name]
    for name in ("batch norm", "cumulative", "not affine", "instance norm", "spectral norm", "reassigned", "in place")
}


class Average(nn.Module):
    """Subtracts a running mean, kept in a buffer that is assigned anew, and counts in another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0), persistent=False)

    def forward(self, x):
        h = self.inner(x)
        if self.training:
            self.count = self.count + 1
            self.mean = 0.9 * self.mean + 0.1 * h.mean(0)
        return h - self.mean


class InPlace(Average):
    """The same, with detached statistics that are written in place."""

    def forward(self, x):
        h = self.inner(x)
        if self.training:
            self.count.add_(1)
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean.clone()


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def everything(module: nn.Module) -> list:
    """All of a module that a call could change, the identity of its attributes included."""
    tensors = fingerprint((dict(module.named_parameters()), dict(module.named_buffers())))
    identities = [
        (key, id(value), len(value) if isinstance(value, dict) else None)
        for part in module.modules()
        for key, value in part.__dict__.items()
    ]
    return [tensors, identities, [p.grad for p in module.parameters()]]


@pytest.mark.parametrize("name", MODULES)
def test_calls_are_the_modules_own_and_leave_it_alone(name: str) -> None:
    module, x = built(name)
    net = Stateless(module)
    params, b = net.params(), net.buffers()
    assert list(params) == [key for key, _ in module.named_parameters()]
    assert list(b) == [key for key, _ in module.named_buffers()]
    before, given = everything(module), fingerprint((params, b, x))

    def value(p):
        torch.manual_seed(1)
        return first(net(p, x))

    output = value(params)
    torch.manual_seed(1)
    with_buffers, new = net(params, x, buffers=b)
    other = {key: value + 0.1 * torch.arange(1.0, value.numel() + 1).reshape(value.shape) for key, value in params.items()}
    moved = value(other)
    gradient = grad(lambda p: value(p).square().sum())(params)
    assert everything(module) == before
    assert fingerprint((params, b, x)) == given
    assert set(gradient) == set(params)
    own = copy.deepcopy(module)
    torch.manual_seed(1)
    expected = first(own(x))
    # Without gradients some modules take a fused path, which rounds differently.
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(moved, expected, rtol=1e-3)
    assert torch.allclose(first(with_buffers), expected, rtol=1e-5, atol=1e-6)
    assert bits(new) == bits(dict(own.named_buffers()))
    assert list(new) == list(b)
    assert all(not x.requires_grad for x in new.values())


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("transforms", [False, True], ids=["autograd", "torch.func"])
def test_twenty_steps_leave_the_buffers_of_the_ordinary_module(name: str, transforms: bool) -> None:
    module, x = built(name)
    net = Stateless(module)
    params, b = net.params(), net.buffers()
    ordinary, started = list(module.parameters()), bits(b)

    def loss(p, b, batch):
        output, new = net(p, batch, buffers=b)
        return output.square().mean() - output.sum() / 100, new

    for _ in range(20):
        batch = x + torch.randn_like(x)
        output = module(batch)
        gradients = torch.autograd.grad(output.square().mean() - output.sum() / 100, ordinary)
        with torch.no_grad():
            for p, g in zip(ordinary, gradients, strict=True):
                p -= 0.1 * g
        for buffer in module.buffers():
            buffer.detach_()
        if transforms:
            g, b = grad(loss, has_aux=True)(params, b, batch)
        else:
            leaves = {key: value.requires_grad_() for key, value in params.items()}
            cost, b = loss(leaves, b, batch)
            assert not any(value.requires_grad for value in b.values())
            g = dict(zip(leaves, torch.autograd.grad(cost, list(leaves.values())), strict=True))
        params = {key: (value - 0.1 * g[key]).detach() for key, value in params.items()}
    assert bits(b) == bits(dict(module.named_buffers()))
    assert bits(params) == bits(dict(module.named_parameters()))
    assert bits(b) != started


TRANSFORMS = {
    "grad": lambda f, p, v: grad(f)(p),
    "vjp": lambda f, p, v: vjp(f, p)[1](torch.ones((), dtype=torch.float64))[0],
    "jvp": lambda f, p, v: jvp(f, (p,), (v,))[1],
    "forward over reverse": lambda f, p, v: jvp(grad(f), (p,), (v,))[1],
    "reverse over reverse": lambda f, p, v: vjp(grad(f), p)[1](v)[0],
    # Not torch.func.hessian: torch's own batch norm is wrong where a vmapped backward pass is differentiated (torch 2.13).
    "hessian by columns": lambda f, p, v: jacfwd(grad(f))(p),
    "hessian by rows": lambda f, p, v: jacrev(grad(f))(p),
}


@FORWARD_MODE
@pytest.mark.parametrize("buffers", [False, True], ids=["constants", "in and out"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", WRITING)
def test_transforms_agree_with_plain_autograd(name: str, transform: str, buffers: bool) -> None:
    module, x = built(name, torch.float64)
    net = Stateless(module)
    params, b = net.params(), net.buffers()
    v = {key: torch.randn_like(value) for key, value in params.items()}
    before, given = everything(module), fingerprint(b)

    def f(p):
        output = net(p, x, buffers=b)[0] if buffers else net(p, x)
        return (output * torch.arange(1.0, output.numel() + 1).reshape(output.shape)).square().mean()

    answer = TRANSFORMS[transform](f, params, v)
    leaves = {key: value.clone().requires_grad_() for key, value in params.items()}
    g = torch.autograd.grad(f(leaves), list(leaves.values()), create_graph=True)
    product = sum((a * v[key]).sum() for key, a in zip(leaves, g, strict=True))
    Hv = torch.autograd.grad(product, list(leaves.values()))
    if transform == "jvp":
        expected = [product.detach()]
    elif transform in {"grad", "vjp"}:
        expected = [a.detach() for a in g]
    else:
        expected = list(Hv)
    if transform.startswith("hessian"):
        answer = {i: sum(torch.tensordot(answer[i][j], v[j], v[j].dim()) for j in v) for i in v}
    size = max(float(a.abs().max()) for a in expected)
    for a, e in zip(answer.values() if isinstance(answer, dict) else [answer], expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-9, atol=1e-11 * size)
    assert everything(module) == before
    assert fingerprint(b) == given


@pytest.mark.parametrize("name", [name for name in WRITING if name != "cumulative"])
@pytest.mark.parametrize("mapped", ["parameters", "inputs", "buffers", "all"])
def test_maps_are_loops(name: str, mapped: str) -> None:
    module, x = built(name, torch.float64)
    net = Stateless(module)
    params, b = net.params(), net.buffers()
    axes = [0 if mapped in {"all", kind} else None for kind in ("parameters", "buffers", "inputs")]
    generator = torch.Generator().manual_seed(3)

    def stack(tree, axis):
        if axis is None:
            return tree
        noise = [torch.rand(3, *t.shape, generator=generator).to(t.dtype) for t in tree.values()]
        return {key: t + n for (key, t), n in zip(tree.items(), noise, strict=True)}

    P, B, X = (stack(tree, axis) for tree, axis in zip((params, b, {"x": x}), axes, strict=True))

    def constants(p, x):
        return grad(lambda p: net(p, x["x"]).square().mean() + net(p, x["x"]).sum())(p)

    def in_and_out(p, b, x):
        return net(p, x["x"], buffers=b)

    def lane(tree, axis, i):
        return tree if axis is None else {key: t[i] for key, t in tree.items()}

    many, new = vmap(in_and_out, tuple(axes))(P, B, X)
    for i in range(3):
        output, one = in_and_out(*(lane(tree, axis, i) for tree, axis in zip((P, B, X), axes, strict=True)))
        assert torch.allclose(many[i], output, rtol=1e-10, atol=1e-12)
        assert all(torch.allclose(new[key][i], one[key], rtol=1e-10, atol=1e-12) for key in one)
        assert all(new[key][i].dtype == one[key].dtype for key in one)
    if mapped != "buffers":
        gradients = vmap(constants, (axes[0], axes[2]))(P, X)
        for i in range(3):
            expected = constants(lane(P, axes[0], i), lane(X, axes[2], i))
            assert all(torch.allclose(gradients[key][i], expected[key], rtol=1e-9, atol=1e-11) for key in expected)


def test_maps_nest_below_a_shared_buffer() -> None:
    net = Stateless(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double())
    params, b, x = net.params(), net.buffers(), torch.randn(2, 3, 4, 2, dtype=torch.float64)
    new = vmap(vmap(lambda x: net(params, x, buffers=b)[1]))(x)
    for i in range(2):
        for j in range(3):
            one = net(params, x[i, j], buffers=b)[1]
            assert all(torch.allclose(new[key][i, j], one[key], rtol=1e-12) for key in one)


def test_cumulative_statistics_are_mapped_where_the_count_is_shared() -> None:
    module, x = built("cumulative")
    net = Stateless(module)
    b, many = net.buffers(), torch.stack([x, 2 * x])
    new = vmap(lambda x: net(net.params(), x, buffers=b)[1])(many)
    one = net(net.params(), 2 * x, buffers=b)[1]
    assert torch.allclose(new["1.running_var"][1], one["1.running_var"], rtol=1e-5)


def test_batch_norm_in_training_mode_passes_gradcheck() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
    net, x = Stateless(module), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    names, values = zip(*net.params().items(), strict=True)
    leaves = [value.requires_grad_() for value in values]

    def f(*values):
        return net(dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_modes_are_other_functions_of_the_same_values() -> None:
    module, x = built("batch norm")
    module.append(nn.Dropout(0.5))
    net = Stateless(module)
    params, b = net.params(), net.buffers()
    still = net.eval()
    assert (net.training, still.training, still.train().training) == (True, False, True)
    assert net.train() is net
    assert net.eval() is still
    assert still.eval() is still
    assert list(still.params()) == list(params)
    assert list(still.buffers()) == list(b)
    moved = {**b, "1.running_mean": b["1.running_mean"] + 1}
    output, new = still(params, x, buffers=moved)
    assert bits(new) == bits(moved)
    own = copy.deepcopy(module).eval()
    own[1].running_mean += 1
    assert torch.allclose(output, own(x))
    torch.manual_seed(1)
    trained = net(params, x)
    torch.manual_seed(1)
    assert torch.equal(still.train()(params, x), trained)
    assert module.training


def test_partial_modes_are_kept() -> None:
    module, x = built("a frozen norm in training")
    net = Stateless(module)
    assert bits(net(net.params(), x, buffers=net.buffers())[1]) == bits(net.buffers())
    assert net.train() is not net
    new = net.train()(net.params(), x, buffers=net.buffers())[1]
    assert int(new["1.num_batches_tracked"]) == 1
    assert not module[1].training


def test_structure_and_mode_are_those_at_construction() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).eval()
    net, x = Stateless(module), torch.ones(2, 3)
    params = net.params()
    before = net(params, x)
    module.train()
    module[1].p = 1.0
    module[2] = nn.Identity()
    assert torch.equal(net(params, x), before)
    del module[0].bias
    with pytest.raises(fm.ParameterError, match=r"'0.bias' is no longer a parameter of the module"):
        net.params()


def test_values_are_read_when_they_are_needed() -> None:
    module, x = built("batch norm in eval")
    net = Stateless(module, train="0.*")
    once = net.params()
    assert all(not p.requires_grad for p in once.values())
    with torch.no_grad():
        module[0].weight.add_(1.0)
        module[1].weight.mul_(3.0)
        module[1].running_mean.add_(1.0)
    module.double()
    assert not torch.equal(once["0.weight"].double(), net.params()["0.weight"])
    assert torch.equal(net(net.params(), x.double()), module(x.double()))
    assert bits(net.params()["0.weight"]) == bits(module[0].weight)
    assert bits(net.buffers()) == bits(dict(module.named_buffers()))


def test_a_module_of_its_own_holds_what_it_is_given() -> None:
    module, x = built("batch norm")
    net = Stateless(module, train="0.*")
    b = {key: value + 1 for key, value in net.buffers().items()}
    own = net.module({key: value + 1 for key, value in net.params().items()}, b)
    before = everything(module)
    assert bits(dict(own.named_buffers())) == bits(b)
    assert torch.equal(own[0].weight, module[0].weight + 1)
    assert torch.equal(own[1].weight, module[1].weight)
    assert [p.requires_grad for p in own.parameters()] == [True, True, False, False]
    own(x)
    assert everything(module) == before
    assert bits(dict(net.module(net.params()).named_buffers())) == bits(net.buffers())


def test_parametrized_weights_are_their_originals() -> None:
    class Symmetric(nn.Module):
        def forward(self, w):
            return (w + w.mT) / 2

    module = nn.Linear(2, 2, bias=False).double()
    parametrize.register_parametrization(module, "weight", Symmetric())
    net, x = Stateless(module), torch.tensor([[1.0, 2.0]]).double()
    params = net.params()
    assert list(params) == ["parametrizations.weight.original"]
    # f = Σ x (W + Wᵀ)/2 = 1ᵀ S x, so df/dW = (1 xᵀ + x 1ᵀ)/2.
    g = grad(lambda p: net(p, x).sum())(params)["parametrizations.weight.original"]
    assert torch.equal(g, (torch.ones(2, 1).double() @ x + x.T @ torch.ones(1, 2).double()) / 2)


def test_inputs_by_keyword_outputs_and_repr() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x, *, params, self_=None):
            return {"scaled": params * self.inner(x), "kept": [x, "text"]}

    net, x = Stateless(Two()), torch.ones(1, 2)
    output = net(net.params(), x, params=2.0)
    assert torch.allclose(output["scaled"], 2 * net(net.params(), x, params=1.0)["scaled"])
    assert output["kept"] == [x, "text"]
    assert net(net.params(), x, params=1.0, buffers={})[1] == {}
    assert repr(net) == "Stateless(Two, 6 parameters)"
    many = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50))
    assert repr(Stateless(many, train="1.*")) == "Stateless(Sequential, 100 parameters, 2,050 frozen, 3 buffers)"
    copied = copy.deepcopy(net)
    assert torch.equal(copied(copied.params(), x, params=1.0)["scaled"], net(net.params(), x, params=1.0)["scaled"])
