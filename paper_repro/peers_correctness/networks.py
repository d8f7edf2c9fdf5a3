"""Questions that are not quadratic: logistic regression with example weights, a small net, the loop itself, a convnet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paper_repro.data import load
from paper_repro.peers_correctness.problem import Params, Question, Target
from paper_repro.peers_correctness.quadratics import SHRINK
from paper_repro.peers_correctness.reference import polish, spectrum

LOOPS: frozenset[Target] = frozenset({"unrolled"})
DIFFERENCES: frozenset[Target] = frozenset({"identity", "one step"})


def logistic(seed: int) -> Question:
    """Return g = mean σ(x_i) CE_i(y) + 0.05 ‖y‖², f = mean CE elsewhere: x enters through the weights alone."""
    draw = torch.Generator().manual_seed(seed)
    inputs, labels, inputs_valid, labels_valid = _examples(draw, 30)

    def logits(y: Params, at: Tensor) -> Tensor:
        return at @ y["weight"] + y["bias"]

    def inner(y: Params, x: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(logits(y, inputs.to(x)), labels.to(x), reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 0.05 * ((y["weight"] ** 2).sum() + y["bias"] ** 2)

    def outer(x: Tensor, y: Params) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(y, inputs_valid.to(x)), labels_valid.to(x))

    start = {"weight": torch.zeros(4, dtype=torch.float64), "bias": torch.zeros((), dtype=torch.float64)}
    return _trained("logistic", "a cross term that is not ∇²ₓᵧg", inner, outer, _normal(draw, 30), start)


def net(seed: int) -> Question:
    """The same with a net of five tanh units: a non-convex cost at a local minimum, x enters f too."""
    draw = torch.Generator().manual_seed(seed)
    inputs, labels, inputs_valid, labels_valid = _examples(draw, 40)

    def logits(y: Params, at: Tensor) -> Tensor:
        return torch.tanh(at @ y["w1"] + y["b1"]) @ y["w2"]

    def inner(y: Params, x: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(logits(y, inputs.to(x)), labels.to(x), reduction="none")
        return (torch.sigmoid(x) * losses).mean() + 0.01 * sum((p**2).sum() for p in y.values())

    def outer(x: Tensor, y: Params) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(y, inputs_valid.to(x)), labels_valid.to(x)) + 1e-3 * (x**2).sum()

    start = {"w1": _normal(draw, 4, 5), "b1": _normal(draw, 5), "w2": _normal(draw, 5)}
    return _trained("net", "a solver for quadratics only", inner, outer, _normal(draw, 40), start)


def far_start(seed: int) -> Question:
    """The logistic regression again, its loop begun at zero and run to the solution."""
    base = logistic(seed)
    zero = {name: torch.zeros_like(p) for name, p in base.start.items()}
    return replace(base, name="far start", seen="a cross term taken at the start, not at the solution", start=zero)


def few_steps(seed: int, optimizer: Literal["sgd", "momentum", "adam"]) -> Question:
    """Ten steps of an optimizer from zero on the logistic regression, held against the differentiated loop."""
    base = far_start(seed)
    seen = "an optimizer that is differentiated wrongly"
    start = {name: p + 0.1 for name, p in base.start.items()}
    rate = {"sgd": 0.5, "momentum": 0.2, "adam": 0.1}[optimizer]
    # An ε in another place than torch has it, or a bias correction in float32, moves Adam's derivative by about 1e-5.
    tolerance = 1e-4 if optimizer == "adam" else base.tolerance
    return replace(
        base,
        name=optimizer,
        seen=seen,
        start=start,
        solution=None,
        rate=rate,
        steps=10,
        optimizer=optimizer,
        targets=LOOPS,
        tolerance=tolerance,
    )


def convnet(seed: int, images: int, updates: int) -> Question:
    """A trained convnet on real digits, a weight for each image: what a step of a difference is worth on ReLUs.

    Args:
        seed: decides the images and the first parameters.
        images: how many to train on, and as many to validate on.
        updates: Adam's updates that train it.

    Returns:
        The question; the solution is where training ended, and the loop makes one step of a rate that does not move it.
    """
    draw = torch.Generator().manual_seed(seed)
    digits = load("digits")
    order = torch.randperm(len(digits.x), generator=draw)[: 2 * images]
    train, valid = digits.x[order].double().reshape(2, images, 1, 8, 8)
    labels, labels_valid = digits.y[order].reshape(2, images)

    def logits(y: Params, at: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(F.conv2d(at, y["conv1"], y["bias1"], padding=1)), 2)
        return F.relu(F.conv2d(hidden, y["conv2"], y["bias2"])).flatten(1) @ y["head"]

    def inner(y: Params, x: Tensor) -> Tensor:
        return (torch.sigmoid(x) * F.cross_entropy(logits(y, train.to(x)), labels, reduction="none")).mean()

    def outer(x: Tensor, y: Params) -> Tensor:
        return F.cross_entropy(logits(y, valid.to(x)), labels_valid)

    x = torch.zeros(images, dtype=torch.float64)
    y = {
        "conv1": _normal(draw, 8, 1, 3, 3) / 3,
        "bias1": torch.zeros(8, dtype=torch.float64),
        "conv2": _normal(draw, 16, 8, 3, 3) / 8,
        "bias2": torch.zeros(16, dtype=torch.float64),
        "head": _normal(draw, 64, 10) / 8,
    }
    y = {name: p.requires_grad_() for name, p in y.items()}
    adam = torch.optim.Adam(y.values(), lr=1e-2)
    for _ in range(updates):
        adam.zero_grad()
        inner(y, x).backward()  # type: ignore[no-untyped-call]
        adam.step()
    end = {name: p.detach() for name, p in y.items()}
    seen = "a default step of a finite difference that is too long"
    return Question(
        "convnet", seen, inner, outer, x, end, end, rate=1e-12, steps=1, curvature=1.0, terms=1, targets=DIFFERENCES
    )


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _examples(draw: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs and labels to train and to validate on: a line, with a fifth of the labels turned over."""
    inputs, direction = _normal(draw, 2 * count, 4), _normal(draw, 4)
    turned = torch.rand(2 * count, generator=draw) < 0.2
    labels = ((inputs @ direction > 0) ^ turned).double()
    return inputs[:count], labels[:count], inputs[count:], labels[count:]


def _trained(
    name: str,
    seen: str,
    inner: Callable[[Params, Tensor], Tensor],
    outer: Callable[[Tensor, Params], Tensor],
    x: Tensor,
    start: Params,
) -> Question:
    """Return the question at its solution, with the rate and the steps that its spectrum asks for."""
    solution = polish(inner, start, x)
    least, largest = spectrum(inner, solution, x)
    if least <= 0:
        raise ValueError(f"{name}: the polished point is no minimum (least eigenvalue {least:.2g}); use another seed.")
    terms = int(SHRINK * largest / least) + 1
    return Question(name, seen, inner, outer, x, solution, solution, 1 / largest, terms, largest, terms)
