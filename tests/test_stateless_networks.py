"""Ties, frozen parameters, forwards that keep notes, wrong uses, and a Hugging Face model as it is."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.utils.checkpoint
import torchopt
from torch import nn

import funcmlo as fm
from funcmlo.stateless import Stateless
from tests.oracles import bits, fingerprint

D, P = fm.DefinitionError, fm.ParameterError


class Tied(nn.Module):
    """x Wᵀ W for one W, used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


class Twice(nn.Module):
    """One submodule under two names."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first = self.second = part

    def forward(self, x):
        return self.second(self.first(x))


def test_a_tied_weight_is_held_once_and_its_gradient_is_the_sum() -> None:
    module = Tied().double()
    net = Stateless(module)
    params = net.params()
    assert list(params) == ["a.weight"]
    index = torch.tensor([0, 2])
    weight = torch.randn(3, 2, dtype=torch.float64)
    output = net({"a.weight": weight}, index)
    assert torch.equal(output, weight[index] @ weight.T)
    # f = Σ_i Σ_j w_i · w_j over i in {0, 2} and all j: df/dw_k = [k used] Σ_j w_j + Σ_i w_i.
    g = torch.func.grad(lambda p: net(p, index).sum())({"a.weight": weight})["a.weight"]
    used = torch.tensor([1.0, 0.0, 1.0]).double()[:, None]
    assert torch.allclose(g, used * weight.sum(0) + weight[index].sum(0), rtol=1e-12)
    own = net.module(params)
    assert own.b.weight is own.a.weight
    copied = copy.deepcopy(net)
    assert torch.equal(copied({"a.weight": weight}, index), output)
    assert torch.equal(net.eval()({"a.weight": weight}, index), output)
    assert module.b.weight is module.a.weight


def test_a_shared_submodule_is_held_once_with_its_buffers() -> None:
    torch.manual_seed(0)
    module, x = Twice(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), torch.randn(4, 2)
    net = Stateless(module)
    b = net.buffers()
    assert list(net.params()) == ["first.0.weight", "first.0.bias", "first.1.weight", "first.1.bias"]
    for _ in range(2):  # nothing of the first call is left for the second
        output, new = net(net.params(), x, buffers=b)
        own = copy.deepcopy(module)
        assert torch.equal(output, own(x))
        assert bits(new) == bits(dict(own.named_buffers()))
        assert int(new["first.1.num_batches_tracked"]) == 2


def test_a_buffer_that_two_parts_share_is_one() -> None:
    module, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)), torch.randn(4, 2)
    module[2].running_mean = module[1].running_mean
    net = Stateless(module)
    b = net.buffers()
    assert "2.running_mean" not in b
    _, new = net(net.params(), x, buffers=b)
    module(x)
    assert bits(new) == bits(dict(module.named_buffers()))


def test_frozen_parameters_are_constants() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    module[0].requires_grad_(False)
    net = Stateless(module)
    assert list(net.params()) == ["2.weight", "2.bias"]
    assert torch.equal(net(net.params(), x), module(x))
    assert repr(net) == "Stateless(Sequential, 5 parameters, 16 frozen)"
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(net(net.params(), x), module(x))


@pytest.mark.parametrize(
    "train", ["2.*", ["2.weight", "2.b*"], lambda name: name.startswith("2"), ("2.*",), {"2.weight", "2.bias"}]
)
def test_a_subset_is_trained_whatever_requires_grad_says(train) -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    module[2].requires_grad_(False)
    net = Stateless(module, train)
    assert list(net.params()) == ["2.weight", "2.bias"]
    output = net(net.params(), x)
    assert not output.requires_grad  # the rest is no part of anybody's graph
    assert torch.equal(output, module(x))
    before = fingerprint(dict(module.named_parameters()))
    leaves = {key: value.requires_grad_() for key, value in net.params().items()}
    torch.autograd.grad(net(leaves, x).sum(), list(leaves.values()))
    assert fingerprint(dict(module.named_parameters())) == before
    assert all(p.grad is None for p in module.parameters())


def test_frozen_values_live_once_in_memory() -> None:
    seen = []

    class Big(nn.Linear):
        def forward(self, x):
            seen.append(self.weight.data_ptr())
            return super().forward(x)

    module = Big(3, 2)
    net = Stateless(module, train="bias")
    net(net.params(), torch.ones(1, 3))
    assert seen == [module.weight.data_ptr()]


def test_a_tied_weight_is_trained_where_any_of_its_names_is() -> None:
    module = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2, bias=False)})
    module["head"].weight = module["body"].weight
    assert list(Stateless(module, train="head.*").params()) == ["body.weight"]


class Notes(nn.Module):
    """Keeps what the test says, before it computes 2 x."""

    def __init__(self, note) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.last, self.count, self.seen, self.table, self.full = None, 0, [], {"old": 1}, [1]
        self.state, self.note = torch.zeros(2), note
        self.register_buffer("table_of", None)

    def forward(self, x):
        self.note(self, x)
        return self.w * x


HARMLESS = {
    "last": lambda self, x: setattr(self, "last", x * self.w),
    "a new attribute": lambda self, x: setattr(self, "fresh", x),
    "an empty list": lambda self, x: self.seen.append(x) if not self.seen else 1 / 0,
    "a dict's new key": lambda self, x: self.table.__setitem__("new", x),
    "an empty buffer": lambda self, x: setattr(self, "table_of", x.detach()) if self.table_of is None else 1 / 0,
    "the same number": lambda self, x: setattr(self, "count", 0.0),
}
HARMFUL = {
    "count": (lambda self, x: setattr(self, "count", self.count + 1), r"'count' \(0 before, 1 after\)"),
    "state": (lambda self, x: setattr(self, "state", self.state + x), "'state'"),
    "state in place": (lambda self, x: self.state.add_(x), "'state'"),
    "full": (lambda self, x: self.full.append(x), "'full'"),
    "table": (lambda self, x: self.table.__setitem__("old", x), "'table'"),
    "mode": (lambda self, x: self.eval(), r"'training' \(True before, False after\)"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_notes_are_forgotten(name: str) -> None:
    module = Notes(HARMLESS[name])
    net, x = Stateless(nn.Sequential(module)), torch.ones(2)
    for _ in range(3):
        assert torch.equal(net(net.params(), x), 2 * x)
    part = net._silent[0]
    assert (part.last, part.seen, part.table, part.table_of) == (None, [], {"old": 1}, None)
    assert not hasattr(part, "fresh")


@pytest.mark.parametrize("name", HARMFUL)
def test_a_forward_that_remembers_is_refused(name: str) -> None:
    note, message = HARMFUL[name]
    module = Notes(note)
    net, x = Stateless(module), torch.ones(2)
    for _ in range(2):  # again and again, with the same numbers before and after
        with pytest.raises(D, match=rf"its forward changes the attribute {message}.*register_buffer"):
            net(net.params(), x)
    assert (module.count, module.full, module.table, module.training) == (0, [1], {"old": 1}, True)
    assert torch.equal(module.state, torch.zeros(2))


def test_attributes_are_put_back_after_an_error() -> None:
    def fail(self, x):
        self.count += 1
        raise KeyError("mine")

    net = Stateless(Notes(fail))
    with pytest.raises(KeyError, match="mine"):
        net(net.params(), torch.ones(2))
    assert net._silent.count == 0


def test_no_weights_are_kept_by_recurrent_layers() -> None:
    net = Stateless(nn.LSTM(2, 3))
    net(net.params(), torch.zeros(1, 1, 2))
    assert all(w.is_meta for w in net._silent._flat_weights)


def wider() -> nn.Module:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
            self.register_buffer("sum", torch.zeros(2))

        def forward(self, x):
            self.sum = (self.sum + x.sum(0)).double()
            return self.w * x

    return Wider()


def net_of(module: nn.Module, **settings) -> Stateless:
    return Stateless(module, **settings)


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def compiled() -> nn.Module:
    module = nn.Linear(2, 2)
    wrapper = nn.Sequential(module)
    wrapper._orig_mod = module  # what torch.compile's wrapper has, without its import of seconds
    return wrapper


NORM = nn.BatchNorm1d(2)
X = torch.ones(3, 2)
WRONG = {
    "nothing requires gradients": (lambda: net_of(frozen()), D, r"no parameter to train; all have requires_grad=False"),
    "a predicate that takes nothing": (lambda: net_of(NORM, train=lambda n: False), D, r"train= chooses none"),
    "a pattern for nothing": (lambda: net_of(Tied(), train=["*.lora_*"]), D, r"'\*.lora_\*' matches no parameter.*a.weight"),
    "a name that is misspelt": (lambda: net_of(NORM, train="wieght"), D, r"'wieght' matches.*did you mean 'weight'"),
    "a part for its parameters": (lambda: net_of(Tied(), train=["b"]), D, r"'b' matches.*did you mean 'b\.\*'"),
    "a tensor for a name": (lambda: net_of(NORM, train=list(NORM.parameters())), D, r"Parameter came; expected names"),
    "integers": (
        lambda: net_of(nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1).int(), False)]), train="*"),
        D,
        r"'1' is torch.int32 and cannot be trained",
    ),
    "data parallel": (lambda: net_of(nn.DataParallel(NORM)), D, r"DataParallel spreads.*\.module, instead"),
    "compiled": (lambda: net_of(nn.Sequential(compiled())), D, r"\('0'\) is a compiled module.*\._orig_mod"),
    "meta": (lambda: net_of(nn.Linear(2, 2, device="meta")), D, r"'weight' is on the meta device"),
    "lazy": (lambda: net_of(nn.LazyLinear(2)), D, r"'weight' has no shape yet; call the module on a batch first"),
    "max_norm": (lambda: net_of(nn.Embedding(2, 2, max_norm=1.0)), D, r"Embedding with max_norm= writes to its weights"),
    "a module for parameters": (lambda: net_of(NORM)(NORM, X), P, r"but BatchNorm1d came; a module's values are a dict"),
    "a buffer as a parameter": (lambda: net_of(NORM)(NORM.state_dict(), X), P, r"'running_mean' is a buffer.*buffers="),
    "a tied name": (
        lambda: net_of(Tied())({"b.weight": X}, X),
        P,
        r"'b.weight' is tied to 'a.weight'; give 'a.weight' alone",
    ),
    "a frozen name": (
        lambda: net_of(NORM, train="bias")(dict(NORM.named_parameters()), X),
        P,
        r"'weight' is frozen, a constant of the module; leave it out",
    ),
    "a number for a parameter": (
        lambda: net_of(NORM)({"weight": 1.0, "bias": torch.zeros(2)}, X),
        P,
        r"parameter 'weight' is float; expected a tensor",
    ),
    "a tensor for buffers": (
        lambda: net_of(NORM)(net_of(NORM).params(), X, buffers=X),
        P,
        r"takes a dict of buffers, but Tensor came; call net\(params, x, buffers=net.buffers\(\)\)",
    ),
    "a buffer that is missing": (
        lambda: net_of(NORM)(net_of(NORM).params(), X, buffers={"running_mean": torch.zeros(2)}),
        P,
        r"buffer 'running_var' is missing; running_mean came",
    ),
    "a buffer of another shape": (
        lambda: net_of(NORM)(net_of(NORM).params(), X, buffers={**net_of(NORM).buffers(), "running_var": X}),
        P,
        r"buffer 'running_var' has shape \(3, 2\), expected \(2,\); net.buffers\(\) has them all",
    ),
    "a buffer that changes its dtype": (
        lambda: net_of(wider())(net_of(wider()).params(), X, buffers={"sum": torch.zeros(2)}),
        D,
        r"turns the buffer 'sum' from torch.float32, shape \(2,\), into torch.float64",
    ),
    "a hook's weight norm": (lambda: net_of(hooked()), D, r"Linear is normalized by a hook.*parametrizations.weight_norm"),
}


def hooked() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(2, 2))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_wrong_uses_are_named(name: str) -> None:
    wrong, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        wrong()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        deep = torch.utils.checkpoint.checkpoint(nn.Sequential(self.a, nn.Tanh()), x, use_reentrant=False)
        return self.b(deep)


def test_a_checkpoint_inside_of_a_module_is_told():
    net, x = fm.Stateless(Checkpointed()), torch.ones(5, 3)
    program = fm.Multilevel(
        fm.Level("w", lambda w, d: (d * net(w, x) ** 2).mean(), torchopt.sgd(0.1), response=fm.ITD()),
        fm.Level("d", lambda d, w: (net(w, x) ** 2).mean() + d**2, torchopt.sgd(0.1)),
    )
    with pytest.raises(fm.LossError, match=r"evaluated again in the backward pass, as torch.utils.checkpoint does"):
        program.step(program.init({"w": net.params(), "d": torch.ones(())}), {})
