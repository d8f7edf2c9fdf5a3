"""Modules as pure functions; refusals are rows of the table of wrong uses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcmlo as fm
from tests.oracles import bits, fingerprint

MODULES = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)), (4, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Flatten()), (2, 1, 5, 5)),
    "dropout in eval": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).eval(), (4, 3)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), (5, 1, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 3, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_calls_are_the_modules_own_and_leave_it_alone(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape)
    net = fm.Stateless(module)
    params = net.params()
    before = fingerprint((dict(module.named_parameters()), params, x))
    mode = [part.training for part in module.modules()]

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    # Without gradients some modules take a fused path, which rounds differently.
    assert torch.allclose(first(net(params, x)), first(module(x)), rtol=1e-5, atol=1e-6)
    other = {key: value + 0.1 for key, value in params.items()}
    assert not torch.allclose(first(net(other, x)), first(module(x)), rtol=1e-3)
    gradient = torch.func.grad(lambda p: first(net(p, x)).square().sum())(params)
    assert set(gradient) == set(params)
    assert fingerprint((dict(module.named_parameters()), params, x)) == before
    assert [part.training for part in module.modules()] == mode
    assert all(p.grad is None for p in module.parameters())


def test_parameters_are_copies_of_the_values_now() -> None:
    module = nn.Linear(2, 1)
    net = fm.Stateless(module)
    first = net.params()
    assert all(not p.requires_grad for p in first.values())
    with torch.no_grad():
        module.weight.add_(1.0)
    assert bits(net.params()["weight"]) == bits(module.weight)
    assert not torch.equal(first["weight"], module.weight)


def test_keyword_inputs_and_repr() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x, *, scale):
            return scale * self.inner(x)

    net = fm.Stateless(Two())
    x = torch.ones(1, 2)
    assert torch.allclose(net(net.params(), x, scale=2.0), 2 * net(net.params(), x, scale=1.0))
    assert repr(net) == "Stateless(Two, 6 parameters)"


def test_it_works_under_vmap() -> None:
    net = fm.Stateless(nn.Linear(2, 1))
    many = {key: torch.stack([value, value + 1]) for key, value in net.params().items()}
    x = torch.ones(3, 2)
    out = torch.func.vmap(lambda p: net(p, x))(many)
    assert out.shape == (2, 3, 1)
    assert torch.allclose(out[0], net(net.params(), x))


def test_structure_and_mode_are_those_at_construction() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).eval()
    net, x = fm.Stateless(module), torch.ones(2, 3)
    params = net.params()
    before = net(params, x)
    module.train()
    module[1].p = 1.0
    module[2] = nn.Identity()
    assert torch.equal(net(params, x), before)
