"""boat: `Problem.run_iter` with naive gradient descent below and its conjugate gradient."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paper_repro.holder import Holder
from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings

boat = importlib.import_module("boat_torch")


def lower_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return g; boat finds this function by its path."""
    (x,) = upper.parameters()
    value: Tensor = lower(lambda y: feed["problem"].lower(y, x), **options)
    return value


def upper_loss(feed: dict[str, Any], upper: nn.Module, lower: nn.Module, **options: Any) -> Tensor:
    """Return f; boat finds this function by its path."""
    (x,) = upper.parameters()
    value: Tensor = lower(lambda y: feed["problem"].upper(x, y), **options)
    return value


def cg(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return the method; a tolerance of 0 makes boat's solver keep its last iterate, which it loses when it stops early."""
    below, above = Holder(problem.classifier()), Holder({"x": torch.zeros(len(problem.x))})
    (weights,) = above.parameters()
    optimizer = torch.optim.SGD(below.parameters(), lr=settings.lower_lr, momentum=settings.momentum)

    def answer(x: Tensor, steps: int) -> Tensor:
        with torch.no_grad():
            weights.copy_(x)
        weights.grad = None  # boat adds to it
        with tempfile.TemporaryDirectory() as folder:
            config: dict[str, Any] = {
                "fo_op": None,
                "gm_op": ["NGD"],
                "na_op": ["CG"],
                "lower_level_model": below,
                "upper_level_model": above,
                "lower_level_var": list(below.parameters()),
                "upper_level_var": list(above.parameters()),
                "lower_level_opt": optimizer,
                "upper_level_opt": torch.optim.SGD(above.parameters(), lr=0.0),
                "lower_iters": steps,
                "device": "cpu",
                "loss_log_path": str(Path(folder) / "losses.json"),
                "accumulate_grad": False,
                "copy_last_param": True,
                "return_grad": True,
                "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
                "RGT": {"truncate_iter": 0},
                "CG": {"tolerance": 0.0, "k": int(knobs.linear)},
            }
            losses = {
                "lower_level_loss": {"function": f"{__name__}.lower_loss", "params": {}},
                "upper_level_loss": {"function": f"{__name__}.upper_loss", "params": {}},
            }
            solver = boat.Problem(config, losses)
            solver.build_ll_solver()
            solver.build_ul_solver()
            feed = {"problem": problem}
            gradients, _ = solver.run_iter(feed, feed, current_iter=0)
        return torch.as_tensor(gradients[0]).detach()

    return answer


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {"boat-cg": cg}
