"""betty: two problems in an `Engine` that is set up once; the lower one's parameters are put back before each run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.peers.problem import Params, Problem, costs_of

betty = importlib.import_module("betty.problems")
engines = importlib.import_module("betty.engine")
configs = importlib.import_module("betty.configs")


def prepare(problem: Problem, variant: str) -> Callable[[], Params]:
    """Return the function that computes the hypergradient.

    Args:
        problem: what is asked; CG, Neumann or a difference.
        variant: none.

    Returns:
        A function without arguments.
    """
    del variant
    logging.getLogger("betty").disabled = True
    costs, found = costs_of(problem), dict[str, Tensor]()
    start, hyper = problem.tensors(problem.drawn.start), problem.tensors(problem.drawn.hyper)
    below, above = Holder(start), Holder(hyper)

    class Lower(betty.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            del batch
            value: Tensor = self.module(lambda y: costs.inner(y, self.upper.module(lambda x: x)))
            return value

    class Upper(betty.ImplicitProblem):  # type: ignore[misc, name-defined]
        def training_step(self, batch: Any) -> Tensor:
            del batch
            value: Tensor = self.lower.module(lambda y: costs.outer(self.module(lambda x: x), y))
            return value

        def grad_callback(self) -> None:
            found.update({name: p.grad.detach().clone() for name, p in self.module.named_parameters()})

    known: dict[str, dict[str, Any]] = {
        "cg": {"type": "cg", "cg_iterations": problem.products},
        "neumann": {"type": "neumann", "neumann_iterations": problem.products, "neumann_alpha": problem.rate},
        "difference": {"type": "darts"},
    }
    data = [(torch.zeros(1),)]
    lower = Lower(
        name="lower",
        config=configs.Config(unroll_steps=problem.steps, **known[problem.estimator]),
        module=below,
        optimizer=torch.optim.SGD(below.parameters(), lr=problem.rate),
        train_data_loader=data,
    )
    upper = Upper(
        name="upper",
        config=configs.Config(retain_graph=True, allow_unused=True, first_order=True),
        module=above,
        optimizer=torch.optim.SGD(above.parameters(), lr=0.0),
        train_data_loader=data,
    )
    dependencies = {"l2u": {lower: [upper]}, "u2l": {upper: [lower]}}
    options = configs.EngineConfig(train_iters=problem.steps, valid_step=problem.steps + 1, strategy="cpu")
    engine = engines.Engine(config=options, problems=[upper, lower], dependencies=dependencies)

    def call() -> Params:
        with torch.no_grad():
            for name, p in below.named_parameters():
                p.copy_(start[name])
        engine.run()
        return dict(found)

    return call
