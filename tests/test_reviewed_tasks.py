"""Faults that a review found: each test failed before it was mended."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor, nn

import funcmlo as fm
from funcmlo import _tree
from tests.launch import ROOT

DIM, TASKS = 3, 2


def mapped(response: fm.BestResponse, chunk: int | None) -> Tensor:
    """The meta-gradient of a cost with a determinant and a solve, whose forward derivatives torch has wrong in two maps."""

    def adapt(own: Tensor, meta: Tensor, batch: Tensor) -> Tensor:
        matrix = batch + torch.diag(meta.exp() + own**2)
        return torch.linalg.solve(matrix, own) @ own + 0.1 * torch.logdet(matrix) + ((own - meta) ** 2).sum()

    program = fm.Multilevel(
        fm.Level(
            "own", adapt, torchopt.sgd(0.1), steps=2, response=response, tasks=TASKS, chunk=chunk, init=lambda meta: meta
        ),
        fm.Level("meta", lambda meta, own: (own**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"meta": torch.linspace(0.1, 1.0, DIM, dtype=torch.float64)})
    root = torch.randn(TASKS, DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient: Tensor = program.hypergradient(state, {"own": root @ root.mT}, of="meta")
    return gradient


@pytest.mark.parametrize("response", [fm.ITD(mode="forward"), fm.ITD(mode="forward", chunk=1)], ids=repr)
def test_forward_mode_in_mapped_tasks_is_reverse_mode(response: fm.BestResponse) -> None:
    torch.testing.assert_close(mapped(response, None), mapped(fm.ITD(), 1), rtol=1e-10, atol=1e-12)


def test_samples_in_mapped_tasks_are_those_of_a_loop() -> None:
    torch.testing.assert_close(mapped(fm.ForwardGradient(4), None), mapped(fm.ForwardGradient(4), 1), rtol=1e-10, atol=1e-12)


def test_attention_with_dropout_in_forward_mode_does_not_end_the_process() -> None:
    script = """
import torch, torchopt, funcmlo as fm, torch.nn.functional as F
def adapt(own, meta):
    x = own.reshape(1, 3, 4)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3).square().mean() + ((own - meta) ** 2).sum()
program = fm.Multilevel(
    fm.Level(
        "own", adapt, torchopt.sgd(0.1), response=fm.ITD(mode="forward"), tasks=2, init=lambda meta: meta, randomness="same"
    ),
    fm.Level("meta", lambda meta, own: (own**2).sum(), torchopt.sgd(0.1)),
)
print(program.hypergradient(program.init({"meta": torch.ones(12)}), {}, of="meta").isfinite().all())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "True" in done.stdout


def test_weight_normalization_has_its_second_derivatives() -> None:
    torch.manual_seed(0)
    net = fm.Stateless(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)).double())
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)

    def train(w: dict[str, Tensor], decay: Tensor) -> Tensor:
        return ((net(w, x) - y) ** 2).mean() + decay.exp() * sum((p**2).sum() for p in w.values())

    def program(response: fm.BestResponse) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("w", train, torchopt.sgd(0.1), steps=3, response=response),
            fm.Level("decay", lambda decay, w: F.mse_loss(net(w, x[:3]), y[:3]), torchopt.sgd(0.1)),
        )

    def cost(decay: Tensor) -> Tensor:
        one = program(fm.ITD())
        return one.cost(one.init({"w": net.params(), "decay": decay}), {}, of="decay")

    at, h = torch.zeros((), dtype=torch.float64), 1e-5
    expected = (cost(at + h) - cost(at - h)) / (2 * h)
    for response in (fm.ITD(), fm.ITD(mode="forward")):
        one = program(response)
        came = one.hypergradient(one.init({"w": net.params(), "decay": at}), {}, of="decay")
        # The difference's error: h² for its third derivative of order one, and rounding 1e-16/h.
        torch.testing.assert_close(came, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_starts_are_drawn_as_inner_loops_draw_them(randomness: Any) -> None:
    def start(chunk: int | None) -> Tensor:
        program = fm.Multilevel(
            fm.Level(
                "y",
                lambda y, x: ((y - x) ** 2).sum(),
                torchopt.sgd(0.0),
                tasks=5,
                chunk=chunk,
                randomness=randomness,
                init=lambda x: x + torch.rand(1),
            ),
            fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.0)),
        )
        state = program.init({"x": torch.zeros(1)})
        after, _ = program.step(state, {})
        assert torch.equal(after.params["y"], state.params["y"])
        return state.params["y"]

    starts = [start(chunk) for chunk in (None, 2, 1)]
    assert all(len(y.unique()) == (1 if randomness == "same" else 5) for y in starts)
    if randomness == "same":
        assert torch.equal(starts[0], starts[1])
        assert torch.equal(starts[0], starts[2])
    assert _tree.size(starts[0]) == 5
