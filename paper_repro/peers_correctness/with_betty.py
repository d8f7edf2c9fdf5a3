"""betty: two problems in an `Engine`, whose upper gradient is read in `grad_callback` before the optimizer's step."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.holder import Holder
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Question, torch_optimizer

betty = importlib.import_module("betty.problems")
engines = importlib.import_module("betty.engine")
configs = importlib.import_module("betty.configs")

Config = Callable[[Question], dict[str, Any]]


def _method(base: Any, config: Config) -> Callable[[Question], Tensor]:
    """Return the method that runs the engine for one upper step with this kind of lower problem and its `Config`."""

    def call(question: Question) -> Tensor:
        found: list[Tensor] = []

        def upper_parameters(problem: Any) -> Tensor:
            (x,) = problem.parameters()
            return torch.as_tensor(x)

        class Lower(base):  # type: ignore[misc]
            def training_step(self, batch: Any) -> Tensor:
                del batch
                value: Tensor = self.forward(lambda y: question.inner(y, upper_parameters(self.upper)))
                return value

            def forward(self, call: Any) -> Any:
                if base is betty.IterativeProblem:
                    return self.fmodule(self.params, self.buffers, call)
                return self.module(call)

        class Upper(betty.ImplicitProblem):  # type: ignore[misc, name-defined]
            def training_step(self, batch: Any) -> Tensor:
                del batch
                (x,) = self.module.parameters()
                value: Tensor = self.lower.forward(lambda y: question.outer(x, y))
                return value

            def grad_callback(self) -> None:
                (x,) = self.module.parameters()
                found.append(x.grad.detach().clone())

        logging.getLogger("betty").disabled = True
        below, above = Holder(question.start), Holder({"x": question.x})
        data = [(torch.zeros(1),)]
        lower = Lower(
            name="lower",
            config=configs.Config(unroll_steps=question.steps, **config(question)),
            module=below,
            optimizer=torch_optimizer(question, below.parameters()),
            train_data_loader=data,
        )
        upper = Upper(
            name="upper",
            config=configs.Config(retain_graph=True, first_order=base is betty.ImplicitProblem),
            module=above,
            optimizer=torch.optim.SGD(above.parameters(), lr=0.0),
            train_data_loader=data,
        )
        dependencies = {"l2u": {lower: [upper]}, "u2l": {upper: [lower]}}
        options = configs.EngineConfig(train_iters=question.steps, valid_step=question.steps + 1, strategy="cpu")
        engines.Engine(config=options, problems=[upper, lower], dependencies=dependencies).run()
        return found[0]

    return call


def _implicit(config: Config) -> Callable[[Question], Tensor]:
    return _method(betty.ImplicitProblem, config)


def _cg(alpha: float) -> Callable[[Question], Tensor]:
    return _implicit(lambda q: {"type": "cg", "cg_iterations": q.size, "cg_alpha": alpha})


def _neumann(question: Question) -> dict[str, Any]:
    return {"type": "neumann", "neumann_iterations": question.terms, "neumann_alpha": 1 / question.curvature}


METHODS = (
    Method("IterativeProblem", "unrolled", _method(betty.IterativeProblem, lambda q: {}), uses_rate=True),
    Method("HigherIterativeProblem", "unrolled", _method(betty.HigherIterativeProblem, lambda q: {}), uses_rate=True),
    Method("cg", "implicit", _cg(1.0)),
    # One product is enough where H is a multiple of the identity; elsewhere it is not meant to be.
    Method("cg, 1 product", "implicit", _implicit(lambda q: {"type": "cg"}), suits=lambda q: q.name == "H = 2I"),
    Method("cg, cg_alpha=0.1", "implicit", _cg(0.1)),
    Method("neumann", "implicit", _implicit(_neumann)),
    Method("darts", "identity", _implicit(lambda q: {"type": "darts"}), difference=True),
    Method(
        "darts, darts_alpha=1e-4", "identity", _implicit(lambda q: {"type": "darts", "darts_alpha": 1e-4}), difference=True
    ),
    Method("sama, SGD below", "identity", _implicit(lambda q: {"type": "sama"}), difference=True),
)
