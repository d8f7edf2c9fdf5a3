"""Tapes: what they hold, what they come to again, and what is seen of a function's other doings."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from funcmlo.recording.code import code
from funcmlo.recording.effects import watching
from funcmlo.recording.replay import draws, split
from funcmlo.recording.tape import Tape, kind, record
from tests.oracles import bits

W = torch.linspace(-1, 1, 12).reshape(3, 4)


def taped(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Tape:
    _, tape, why = record(function, inputs, 2**20)
    assert why is None
    assert tape is not None
    return tape


def again(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], fixed: int = 0, cotangents: int = 0):
    """The parts of a function's tape, its code, and what it returns when it is called again."""
    tape = taped(function, inputs)
    varying = len(inputs) - fixed - cotangents
    results = len(tape.outputs) - (1 if cotangents else 0)
    parts = split(tape, varying, fixed, results)
    assert not isinstance(parts, str)
    make, text = code(parts, varying, range(varying + fixed, len(inputs)), [kind(x) for x in tape.tensors])
    outside = [inputs[n] if n < len(inputs) else tape.constants[n] for n in parts.outside]
    return parts, make(outside), text


def layer(x: Tensor, w: Tensor) -> list[Tensor]:
    scaled = w.exp() / 2  # of the fixed input alone
    out = torch.zeros_like(x @ scaled)
    out += (x @ scaled).tanh()
    unused = (x * 3).sin().sum()
    del unused
    return [out.view(-1).view(out.shape), out.detach().sum(dim=0)]


def test_code_comes_to_the_same_bits_on_other_inputs() -> None:
    torch.manual_seed(0)
    _, (forward, _), _ = again(layer, [torch.randn(5, 3), W], fixed=1)
    for _ in range(3):
        x = torch.randn(5, 3)
        assert bits(list(forward(x)[0])) == bits(layer(x, W))


def test_what_does_not_change_is_computed_once_and_what_nobody_needs_never() -> None:
    parts, _, text = again(layer, [torch.randn(5, 3), W], fixed=1)
    once, forward = ([str(one.operation) for one in part] for part in (parts.once, parts.forward))
    assert "aten.exp.default" in once
    assert "aten.exp.default" not in forward
    assert not {"aten.sin.default", "aten.detach.default", "aten.view.default"} & {*once, *forward}
    assert text.startswith("def make(outside):")


def test_a_derivative_runs_back_with_what_the_forward_part_kept() -> None:
    def both(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        x.requires_grad_()
        with torch.enable_grad():
            y = (x @ w.exp()).sin()
        return [y, *torch.autograd.grad(y, [x], v)]

    torch.manual_seed(1)
    parts, (forward, backward), _ = again(both, [torch.randn(5, 3), W, torch.randn(5, 4)], fixed=1, cotangents=1)
    assert parts.kept
    x, v = torch.randn(5, 3), torch.randn(5, 4)
    (y,), kept = forward(x)
    expected = both(x.clone(), W, v)
    assert bits([y, *backward(kept, v)]) == bits([expected[0].detach(), expected[1]])
    assert bits(list(backward(kept, v))) == bits(list(backward(kept, v)))


def test_inputs_that_share_their_memory_are_two() -> None:
    x = torch.tensor([1.0, 2.0])
    y = x.reshape(1, 2)
    for a, b in ((x, x), (y, y)):
        _, (forward, _), _ = again(lambda a, b: [a.t().detach() * 10 + b.t()], [a, b])
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        assert forward(one, zero)[0][0].flatten().tolist() == [10, 10]
        assert forward(zero, one)[0][0].flatten().tolist() == [1, 1]


def test_questions_about_types_are_no_values() -> None:
    taped(lambda x: [x.to(torch.promote_types(x.dtype, torch.float32)) + 1], [torch.ones(2)])


def test_draws_are_noted_and_never_left_out() -> None:
    tape = taped(lambda x: [x + 1, torch.rand(2) * 0 + torch.bernoulli(torch.full((2,), 0.5))], [torch.ones(2)])
    assert sum(map(draws, tape.instructions)) == 2
    one = taped(lambda x: [x + 1 if torch.rand(2).shape else x], [torch.ones(2)])
    parts = split(one, 1, 0, 1)
    assert not isinstance(parts, str)
    assert parts.draws  # nobody needs the number, and the next one depends on it


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: [x * x.sum().item()], "reads a value"),
        (lambda x: [x if x.sum() > 0 else -x], "reads a value"),
        (lambda x: [W], "returns what it did not compute"),
        (lambda x: [x.expand(100, 2).exp().sum() * x], "are large"),
    ],
)
def test_what_cannot_be_recorded_is_said(function: Callable[[Tensor], list[Tensor]], why: str) -> None:
    _, tape, found = record(function, [torch.ones(2)], 100)
    assert tape is None
    assert why in str(found)


def test_an_operation_that_writes_to_what_it_is_given_is_not_replayed() -> None:
    held = torch.zeros(2)
    for function in (lambda x: [x.mul_(2) + 1], lambda x: [held.add_(x) + 1]):
        tape = taped(function, [torch.ones(2)])
        assert split(tape, 1, 0, 1) == "it writes to what it is given"


def test_recordings_are_compared_by_operations_forms_and_numbers() -> None:
    one = taped(lambda x: [x * 2], [torch.ones(2)])
    assert one.does_as(taped(lambda x: [x * 2], [torch.zeros(2)]))
    for other in (
        taped(lambda x: [x * 3], [torch.ones(2)]),
        taped(lambda x: [x * 2.0], [torch.ones(2)]),
        taped(lambda x: [x + 2], [torch.ones(2)]),
        taped(lambda x: [x * 2], [torch.ones(3)]),
    ):
        assert not one.does_as(other)
    a, b = torch.ones(2), torch.ones(2)
    first, second = taped(lambda x: [x * a], [a]), taped(lambda x: [x * b], [a])
    assert first.does_as(second)
    assert not first.closes_over(second.constants)


# What a function does besides


class Counting(torch.nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


LIST: list[float] = []
TABLE = {"a": 2.0}
NETWORK = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.LayerNorm(3))
COUNTER = 0


def counting(x: Tensor) -> Tensor:
    global COUNTER
    COUNTER += 1
    return x


def local_work(x: Tensor) -> Tensor:
    parts = {name: x * value for name, value in TABLE.items()}
    return torch.stack([*parts.values()]).sum() * math.sqrt(4.0) + max(1, len(parts)) + sum(p.sum() for p in parts.values())


@pytest.mark.parametrize("function", [local_work, NETWORK, lambda x: torch.einsum("i,i->", x, x), lambda x: f"{x.shape}"])
def test_what_only_computes_is_not_suspected(function: Callable[[Tensor], object]) -> None:
    with torch.no_grad(), watching() as seen:
        function(torch.ones(2))
    assert seen.why is None


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: print(end=""), "calls print"),
        (lambda x: LIST.append(1.0), "calls append"),
        (counting, "stores COUNTER"),
        (Counting(), "stores calls"),
        (lambda x: TABLE.__setitem__("b", 1.0), "stores __setitem__"),
        (lambda x: TABLE.update(b=1.0), "calls update"),
        (lambda x: time.time(), "calls time"),
        (lambda x: random.random(), "calls random"),
        (lambda x: x.numpy(), "leaves torch"),
        (lambda x: x.tolist(), "leaves torch"),
        (lambda x: np.asarray(x), "calls asarray"),
        (lambda x: torch.default_generator.manual_seed(3), "seeds a generator"),
        (lambda x: setattr(NETWORK, "name", 1), "calls setattr"),
    ],
)
def test_what_does_more_is_seen(function: Callable[[Tensor], object], why: str) -> None:
    torch.manual_seed(0)
    with watching() as seen:
        function(torch.ones(2))
    assert why in str(seen.why)


def test_garbage_is_not_collected_meanwhile() -> None:
    def told(phase: str, info: dict[str, int]) -> None:
        LIST.append(float(phase == "start"))

    gc.callbacks.append(told)
    try:
        with watching() as seen:
            [[] for _ in range(100_000)]
    finally:
        gc.callbacks.remove(told)
    assert seen.why is None
    assert gc.isenabled()


def test_nothing_is_known_while_a_profiler_watches() -> None:
    import sys

    sys.setprofile(lambda *_: None)
    try:
        with watching() as seen:
            pass
    finally:
        sys.setprofile(None)
    assert seen.why == "a profiler is watching"
