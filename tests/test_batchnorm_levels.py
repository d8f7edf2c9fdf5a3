"""BatchNorm as a level's buffers: a program's statistics are those of the same updates on the ordinary module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

import funcmlo as fm
from paper_repro.networks import resnet18, resnet32

OUTER, INNER, RATE, EXAMPLES = 20, 3, 0.01, 6
Params = dict[str, Tensor]


class Plain:
    """The same updates by hand on the module itself, p ← p − α ∇, or by torch.optim.SGD."""

    def __init__(self, module: nn.Module, by_optimizer: bool) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), lr=RATE) if by_optimizer else None

    def step(self, weights: Tensor, x: Tensor, y: Tensor) -> None:
        loss = weighted(weights, self.module(x), y)
        gradients = torch.autograd.grad(loss, list(self.module.parameters()))
        if self.optimizer is not None:
            for p, g in zip(self.module.parameters(), gradients, strict=True):
                p.grad = g
            self.optimizer.step()
            return
        with torch.no_grad():
            for p, g in zip(self.module.parameters(), gradients, strict=True):
                p.copy_(p - RATE * g)


def weighted(weights: Tensor, output: Tensor, y: Tensor) -> Tensor:
    return (weights.sigmoid() * F.cross_entropy(output, y, reduction="none")).mean()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    networks = {
        "resnet18": lambda: resnet18(3, width=2),
        "resnet32": lambda: resnet32(3, width=2),
    }
    return networks[name]()


def batches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(OUTER * INNER, EXAMPLES, 3, 8, 8, generator=generator).to(dtype)
    return x + 0.5, torch.randint(3, (OUTER * INNER, EXAMPLES), generator=generator)


def run(
    name: str, response: fm.BestResponse, by_optimizer: bool, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Run program and plain module side by side; return the statistics of the program, the module, and at the start."""
    net, module = fm.Stateless(made(name).to(dtype)), made(name).to(dtype)
    plain, (x, y) = Plain(module, by_optimizer), batches(dtype)

    def lower(net_: Params, weights: Tensor, buffers: Any, batch: Any) -> Any:
        output, new = net(net_, batch[0], buffers=buffers)
        return weighted(weights, output, batch[1]), {"buffers": new}

    def upper(weights: Tensor, net_: Params, net__buffers: Any) -> Tensor:
        output, _ = net.eval()(net_, x[0], buffers=net__buffers)
        return F.cross_entropy(output, y[0])

    program = fm.Multilevel(
        fm.Level("net_", lower, torchopt.sgd(RATE), steps=INNER, response=response),
        fm.Level("weights", upper, torchopt.adam(0.1)),
    )
    start = net.buffers()
    state = program.init({"net_": net.params(), "weights": torch.zeros(EXAMPLES, dtype=dtype)}, buffers={"net_": start})
    for k in range(OUTER):
        for t in range(k * INNER, (k + 1) * INNER):
            plain.step(state.params["weights"], x[t], y[t])
        state, _ = program.step(state, {"net_": lambda t: (x[t], y[t])})
    assert float(state.params["weights"].abs().max()) > 0.1  # the upper level has moved
    return state.buffers["net_"], dict(module.named_buffers()), start


RESPONSES = {"itd": fm.ITD(), "cg": fm.AID(fm.CG(3, damping=1.0)), "finite-difference": fm.FiniteDifference()}


@pytest.mark.parametrize("name", ["resnet18", "resnet32"])
@pytest.mark.parametrize("response", RESPONSES)
def test_statistics_are_those_of_the_ordinary_module_to_the_bit(name: str, response: str) -> None:
    found, expected, start = run(name, RESPONSES[response], by_optimizer=False)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")} == {OUTER * INNER}
    moved = [not torch.equal(found[key], start[key]) for key in start if key.endswith("running_mean")]
    assert all(moved)


@pytest.mark.parametrize("name", ["resnet18", "resnet32"])
def test_statistics_are_those_of_torch_optim(name: str) -> None:
    # torch.optim rounds p − αg once where the program rounds twice. Norms over six examples in sixty steps amplify that, by
    # some 10⁷ in ResNet-18, whose last images have one pixel: float64 leaves room for it, float32 does not.
    found, expected, _ = run(name, fm.ITD(), by_optimizer=True, dtype=torch.float64)
    for key, value in expected.items():
        assert float((found[key] - value).double().norm()) <= 1e-6 * float(value.double().norm()), key
