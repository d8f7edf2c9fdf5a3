"""What the workloads are made of: data and starts, drawn by numpy, the same for all libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.generic]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Drawn:
    """One draw of a workload, in float64, int64 and bool.

    Attributes:
        start: the inner parameters where each inner loop begins.
        hyper: the hyperparameters; empty where the start itself is differentiated by (MAML).
        data: what the costs read; of tasks the support examples, tasks first.
        query: of tasks, what the outer cost reads.
    """

    start: Arrays
    hyper: Arrays = field(default_factory=dict)
    data: Arrays = field(default_factory=dict)
    query: Arrays = field(default_factory=dict)


def layers(draw: Generator, sizes: Sequence[int]) -> Arrays:
    """Return weights of He's size and zero biases of linear layers."""
    found: Arrays = {}
    for i, (inner, outer) in enumerate(pairwise(sizes), 1):
        found |= {f"w{i}": draw.normal(size=(outer, inner)) * math.sqrt(2 / inner), f"b{i}": np.zeros(outer)}
    return found


def convolutions(draw: Generator, channels: Sequence[int], side: int, classes: int) -> Arrays:
    """Return the weights of 3×3 convolutions, each with a pool behind it, and of a linear head."""
    found: Arrays = {}
    for i, (inner, outer) in enumerate(pairwise(channels), 1):
        size = math.sqrt(2 / (9 * inner))
        found |= {f"w{i}": draw.normal(size=(outer, inner, 3, 3)) * size, f"b{i}": np.zeros(outer)}
        side //= 2
    features = channels[-1] * side**2
    return found | {"head": draw.normal(size=(classes, features)) / math.sqrt(features), "bias": np.zeros(classes)}


def logistic(draw: Generator, *, examples: int, features: int) -> Drawn:
    """Return two classes that a plane divides, a tenth of them on its wrong side."""
    plane = draw.normal(size=features)

    def some() -> tuple[Array, Array]:
        inputs = draw.normal(size=(examples, features))
        return inputs, ((inputs @ plane > 0) ^ (draw.random(examples) < 0.1)).astype(np.float64)

    (inputs, labels), (valid_inputs, valid_labels) = some(), some()
    return Drawn(
        start={"weight": np.zeros(features), "bias": np.zeros(())},
        hyper={"log_decay": np.full(features, -3.0)},
        data={"inputs": inputs, "labels": labels, "valid_inputs": valid_inputs, "valid_labels": valid_labels},
    )


def cleaning(draw: Generator, *, sizes: Sequence[int], examples: int, valid: int) -> Drawn:
    """Return classes told by a linear teacher, half of the training labels wrong, and a weight for each example."""
    teacher = draw.normal(size=(sizes[0], sizes[-1]))
    inputs, valid_inputs = draw.normal(size=(examples, sizes[0])) / 3, draw.normal(size=(valid, sizes[0])) / 3
    wrong = draw.integers(sizes[-1], size=examples)
    labels = np.where(draw.random(examples) < 0.5, wrong, (inputs @ teacher).argmax(1))
    return Drawn(
        start=layers(draw, sizes),
        hyper={"logits": np.zeros(examples)},
        data={
            "inputs": inputs,
            "labels": labels,
            "valid_inputs": valid_inputs,
            "valid_labels": (valid_inputs @ teacher).argmax(1),
        },
    )


def weight_net(draw: Generator, *, side: int, channels: Sequence[int], batch: int, hidden: int) -> Drawn:
    """Return images of noise with ten labels, and a net from an example's loss to its weight."""
    shape = (batch, channels[0], side, side)
    return Drawn(
        start=convolutions(draw, channels, side, 10),
        hyper=layers(draw, (1, hidden, 1)),
        data={
            "inputs": draw.normal(size=shape),
            "labels": draw.integers(10, size=batch),
            "valid_inputs": draw.normal(size=shape),
            "valid_labels": draw.integers(10, size=batch),
        },
    )


def sequences(draw: Generator, *, width: int, length: int, batch: int, vocabulary: int, depth: int) -> Drawn:
    """Return sequences of random tokens, a transformer, and a weight for each sequence."""
    start: Arrays = {
        "tokens": draw.normal(size=(vocabulary, width)) * 0.1,
        "places": draw.normal(size=(length, width)) * 0.1,
        "head_bias": np.zeros(vocabulary),
    }
    for layer in range(1, depth + 1):
        for name in ("query", "key", "value", "out"):
            start[f"{name}{layer}"] = draw.normal(size=(width, width)) / math.sqrt(width)
            start[f"{name}{layer}_bias"] = np.zeros(width)
        start[f"up{layer}"] = draw.normal(size=(4 * width, width)) / math.sqrt(width)
        start[f"up{layer}_bias"] = np.zeros(4 * width)
        start[f"down{layer}"] = draw.normal(size=(width, 4 * width)) / math.sqrt(4 * width)
        start[f"down{layer}_bias"] = np.zeros(width)
        start |= {f"scale{layer}{at}": np.ones(width) for at in "ab"} | {f"shift{layer}{at}": np.zeros(width) for at in "ab"}
    train, valid = (draw.integers(vocabulary, size=(batch, length + 1)) for _ in range(2))
    return Drawn(
        start=start,
        hyper={"logits": np.zeros(batch)},
        data={
            "tokens": train[:, :-1],
            "next": train[:, 1:],
            "valid_tokens": valid[:, :-1],
            "valid_next": valid[:, 1:],
            "causal": np.tril(np.ones((length, length), dtype=bool)),
        },
    )


def sines(draw: Generator, *, tasks: int, points: int, sizes: Sequence[int]) -> Drawn:
    """Return points of sines with amplitudes in [0.1, 5] and phases in [0, π]."""
    amplitude, phase = draw.uniform(0.1, 5, size=(tasks, 1, 1)), draw.uniform(0, math.pi, size=(tasks, 1, 1))

    def some() -> Arrays:
        inputs = draw.uniform(-5, 5, size=(tasks, points, 1))
        return {"inputs": inputs, "targets": amplitude * np.sin(inputs - phase)}

    return Drawn(start=layers(draw, sizes), data=some(), query=some())


def classes(draw: Generator, *, tasks: int, ways: int, query: int, side: int, channels: Sequence[int]) -> Drawn:
    """Return images of noise, one of each class to learn from, and others to be tested on."""

    def some(count: int) -> Arrays:
        labels = np.tile(np.arange(count) % ways, (tasks, 1))
        return {"inputs": draw.normal(size=(tasks, count, channels[0], side, side)), "labels": labels}

    return Drawn(start=convolutions(draw, channels, side, ways), data=some(ways), query=some(query))
