"""betty: two problems in an `Engine`, with the Neumann series; its upper gradient is read in `grad_callback`.

Its `cg` makes its directions from the residual before the update, and its `darts` takes the identity for H⁻¹: neither comes
within a thousandth (`peers_correctness`), so neither is asked.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings
from paper_repro.peers_accuracy.with_torchopt import LARGEST

betty = importlib.import_module("betty.problems")
engines = importlib.import_module("betty.engine")
configs = importlib.import_module("betty.configs")


def neumann(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the method; the module and its optimizer last, the engine is made for each outer step."""
    below = Holder(problem.classifier())
    optimizer = torch.optim.SGD(below.parameters(), lr=settings.lower_lr, momentum=settings.momentum)
    logging.getLogger("betty").disabled = True
    data = [(torch.zeros(1),)]

    def answer(x: Tensor, steps: int) -> Tensor:
        found: list[Tensor] = []

        class Lower(betty.ImplicitProblem):  # type: ignore[misc, name-defined]
            def training_step(self, batch: Any) -> Tensor:
                del batch
                (weights,) = self.upper.module.parameters()
                value: Tensor = self.module(lambda y: problem.lower(y, weights))
                return value

        class Upper(betty.ImplicitProblem):  # type: ignore[misc, name-defined]
            def training_step(self, batch: Any) -> Tensor:
                del batch
                (weights,) = self.module.parameters()
                value: Tensor = self.lower.module(lambda y: problem.upper(weights, y))
                return value

            def grad_callback(self) -> None:
                (weights,) = self.module.parameters()
                found.append(weights.grad.detach().clone())

        above = Holder({"x": x})
        lower = Lower(
            name="lower",
            config=configs.Config(
                type="neumann", neumann_iterations=int(knobs.linear), neumann_alpha=1 / LARGEST, unroll_steps=steps
            ),
            module=below,
            optimizer=optimizer,
            train_data_loader=data,
        )
        upper = Upper(
            name="upper",
            config=configs.Config(retain_graph=True),
            module=above,
            optimizer=torch.optim.SGD(above.parameters(), lr=0.0),
            train_data_loader=data,
        )
        dependencies = {"l2u": {lower: [upper]}, "u2l": {upper: [lower]}}
        options = configs.EngineConfig(train_iters=steps, valid_step=steps + 1, strategy="cpu")
        engines.Engine(config=options, problems=[upper, lower], dependencies=dependencies).run()
        return found[0]

    return answer


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {"betty-neumann": neumann}
