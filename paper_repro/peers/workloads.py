"""The workloads: what is drawn, which costs, how many steps of which rate, and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from paper_repro.peers import costs, draws
from paper_repro.peers.draws import Arrays, Drawn

ESTIMATORS = ("itd", "cg", "neumann", "difference")
"""The hypergradients: differentiated steps, conjugate gradient, the Neumann series, and H⁻¹ = I by a difference."""


@dataclass(frozen=True)
class Workload:
    """A problem whose hypergradient is timed.

    Attributes:
        name: for `--dataset`.
        summary: one line.
        draw: makes the data and the starts from a generator and a size.
        inner: the inner cost; of tasks, of (ops, y, data).
        outer: the outer cost; of tasks, of (ops, y, query).
        steps: inner steps of gradient descent.
        rate: their rate, and the scale of the Neumann series.
        sizes: arguments of `draw` by preset.
        estimators: which hypergradients are asked for.
        tasks: whether it has tasks, whose shared start is differentiated by.
        together: whether tasks are mapped together where a library can; else they are taken one after the other.
    """

    name: str
    summary: str
    draw: Callable[..., Drawn]
    inner: Callable[..., Any]
    outer: Callable[..., Any]
    steps: int
    rate: float
    sizes: Mapping[str, Mapping[str, Any]]
    estimators: tuple[str, ...] = ESTIMATORS
    tasks: bool = False
    together: bool = True

    def drawn(self, size: str, seed: int) -> Drawn:
        """Return the draw of a size, `"cpu"` or `"smoke"`, by a seed: numbers that float32 has, so that all see the same."""
        found = self.draw(np.random.default_rng(seed), **self.sizes[size])
        return replace(found, **{part.name: _rounded(getattr(found, part.name)) for part in fields(found)})


def _rounded(arrays: Arrays) -> Arrays:
    return {name: a.astype(np.float32).astype(a.dtype) if a.dtype.kind == "f" else a for name, a in arrays.items()}


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(
            "logistic",
            "logistic regression, 500 examples of 20 features, a weight decay for each feature, 100 steps",
            draws.logistic,
            costs.logistic_inner,
            costs.logistic_outer,
            steps=100,
            rate=0.5,
            sizes={"cpu": {"examples": 500, "features": 20}, "smoke": {"examples": 40, "features": 20}},
        ),
        Workload(
            "mlp",
            "hyper-cleaning with an MLP 784-512-512-10, a weight for each of 2,048 examples, 20 steps of the full batch",
            draws.cleaning,
            costs.mlp_inner,
            costs.mlp_outer,
            steps=20,
            rate=0.1,
            sizes={
                "cpu": {"sizes": (784, 512, 512, 10), "examples": 2048, "valid": 512},
                "smoke": {"sizes": (8, 6, 6, 3), "examples": 32, "valid": 8},
            },
        ),
        Workload(
            "convnet",
            "Meta-Weight-Net: three convolutions on 64 images of 3×32×32, a 1-100-1 net from loss to weight, 5 steps",
            draws.weight_net,
            costs.convnet_inner,
            costs.convnet_outer,
            steps=5,
            rate=0.05,
            sizes={
                "cpu": {"side": 32, "channels": (3, 16, 32, 32), "batch": 64, "hidden": 100},
                "smoke": {"side": 8, "channels": (1, 2, 2, 3), "batch": 6, "hidden": 5},
            },
        ),
        Workload(
            "transformer",
            "a transformer of two layers, 128 wide, on 32 sequences of 32 tokens, a weight for each sequence, 5 steps",
            draws.sequences,
            costs.transformer_inner,
            costs.transformer_outer,
            steps=5,
            rate=0.05,
            sizes={
                "cpu": {"width": 128, "length": 32, "batch": 32, "vocabulary": 64, "depth": 2},
                "smoke": {"width": 8, "length": 4, "batch": 3, "vocabulary": 5, "depth": 1},
            },
        ),
        Workload(
            "maml-mlp",
            "MAML: 32 tasks of sinusoid regression, an MLP 1-40-40-1, 10 support and 10 query points, 5 steps",
            draws.sines,
            costs.maml_mlp,
            costs.maml_mlp,
            steps=5,
            rate=0.01,
            sizes={
                "cpu": {"tasks": 32, "points": 10, "sizes": (1, 40, 40, 1)},
                "smoke": {"tasks": 3, "points": 4, "sizes": (1, 5, 5, 1)},
            },
            estimators=("itd",),
            tasks=True,
        ),
        Workload(
            "maml-convnet",
            "MAML: 32 tasks, 5-way 1-shot with 5 query images of 28×28, four convolutions of 32 channels, 5 steps",
            draws.classes,
            costs.maml_convnet,
            costs.maml_convnet,
            steps=5,
            rate=0.03,
            sizes={
                "cpu": {"tasks": 32, "ways": 5, "query": 5, "side": 28, "channels": (1, 32, 32, 32, 32)},
                "smoke": {"tasks": 2, "ways": 3, "query": 3, "side": 16, "channels": (1, 2, 2, 2, 2)},
            },
            estimators=("itd",),
            tasks=True,
            together=False,
        ),
    )
}
