"""boat: `Problem.run_iter` with naive gradient descent below and each way to the upper gradient."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper_repro.holder import Holder
from paper_repro.peers_correctness.methods import Method
from paper_repro.peers_correctness.problem import Question, torch_optimizer

boat = importlib.import_module("boat_torch")


def lower_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return g; boat finds this function by its path."""
    (x,) = upper.parameters()
    value: Tensor = lower(lambda y: feed["question"].inner(y, x), **options)
    return value


def upper_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return f; boat finds this function by its path."""
    (x,) = upper.parameters()
    value: Tensor = lower(lambda y: feed["question"].outer(x, y), **options)
    return value


def _method(operations: list[str], settings: Callable[[Question], dict[str, Any]]) -> Callable[[Question], Tensor]:
    """Return the method that runs one iteration and reads the upper gradient."""

    def call(question: Question) -> Tensor:
        below, above = Holder(question.start), Holder({"x": question.x})
        with tempfile.TemporaryDirectory() as folder:
            config: dict[str, Any] = {
                "fo_op": None,
                "gm_op": ["NGD"],
                "na_op": operations,
                "lower_level_model": below,
                "upper_level_model": above,
                "lower_level_var": list(below.parameters()),
                "upper_level_var": list(above.parameters()),
                "lower_level_opt": torch_optimizer(question, below.parameters()),
                "upper_level_opt": torch.optim.SGD(above.parameters(), lr=0.0),
                "lower_iters": question.steps,
                "device": "cpu",
                "loss_log_path": str(Path(folder) / "losses.json"),
                "accumulate_grad": False,
                "copy_last_param": False,
                "return_grad": True,
                "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
                "RGT": {"truncate_iter": 0},
                "CG": {"tolerance": 1e-10, "k": 4 * question.size},
                "FD": {"r": 1e-2},
                **settings(question),
            }
            module = __name__
            losses = {
                "lower_level_loss": {"function": f"{module}.lower_loss", "params": {}},
                "upper_level_loss": {"function": f"{module}.upper_loss", "params": {}},
            }
            problem = boat.Problem(config, losses)
            problem.build_ll_solver()
            problem.build_ul_solver()
            feed = {"question": question}
            gradients, _ = problem.run_iter(feed, feed, current_iter=0)
        return torch.as_tensor(gradients[0]).detach()

    return call


def _truncated(question: Question) -> dict[str, Any]:
    return {"RGT": {"truncate_iter": max(1, question.steps // 10)}}


METHODS = (
    Method("RAD", "unrolled", _method(["RAD"], lambda q: {}), uses_rate=True),
    # Truncation leaves out the first steps, so it is asked only where they do not matter.
    Method(
        "RGT, RAD",
        "unrolled",
        _method(["RGT", "RAD"], _truncated),
        uses_rate=True,
        suits=lambda q: q.solution is not None,
    ),
    Method("CG", "implicit", _method(["CG"], lambda q: {})),
    Method("CG, tolerance 0", "implicit", _method(["CG"], lambda q: {"CG": {"tolerance": 0.0, "k": q.size}})),
    # NS reads its settings under "CG" in this version.
    Method("NS", "implicit", _method(["NS"], lambda q: {"CG": {"tolerance": 1e-10, "k": q.terms}}), uses_rate=True),
    Method("FD", "one step", _method(["FD"], lambda q: {}), difference=True),
)
