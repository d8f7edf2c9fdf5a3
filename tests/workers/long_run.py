"""Run by torchrun: 50 steps with all that could drive processes apart, and samples that they share."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchopt
from torch import nn

import funcmlo as fm
from tests.workers.data_parallel import batch, error, first
from tests.workers.data_parallel import program as regression
from tests.workers.tell import digest, tell

STEPS = 50


def network() -> tuple[fm.Multilevel, fm.State]:
    """Adam, dropout, BatchNorm, warm starts and a solver that stops by tolerance, in three levels."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    net = fm.Stateless(module.double())

    def train(weights: dict, decay: torch.Tensor, batch: dict, buffers: dict) -> tuple[torch.Tensor, dict]:
        out, new = net(weights, batch["x"], buffers=buffers)
        penalty = sum((w**2).sum() for w in weights.values())
        return F.mse_loss(out[:, 0], batch["y"]) + decay.exp() * penalty, {"buffers": new, "largest": out.detach().max()}

    def valid(decay: torch.Tensor, weights: dict, batch: dict, weights_buffers: dict) -> torch.Tensor:
        out, _ = net.eval()(weights, batch["x"], buffers=weights_buffers)
        return F.mse_loss(out[:, 0], batch["y"]) + 0.01 * decay**2

    response = fm.AID(fm.CG(20, tol=1e-3, damping=1.0), warm_start=True)
    program = fm.Multilevel(
        fm.Level("weights", train, torchopt.adam(0.02), steps=3, response=response),
        fm.Level("decay", valid, torchopt.adam(0.05)),
        parallel="data",
    )
    decay = torch.tensor(-4.0, dtype=torch.float64)
    return program, program.init({"weights": net.params(), "decay": decay}, buffers={"weights": net.buffers()})


def main() -> None:
    """Make the steps; compare samples."""
    with fm.processes() as mine:
        program, state = network()
        part = {
            "weights": lambda t: mine.share(batch("weights", t)),
            "decay": lambda t: mine.share(batch("points", t)),
        }
        every = []
        for _ in range(STEPS):
            state, metrics = program.step(state, part)
            every.append([state.params, state.optimizer, state.response, state.buffers, metrics])
        tell(mine, "50 steps", {"different": len({digest(one) for one in every})}, bits=every)

        drawn: list[float] = []

        def noisy(w: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            drawn.append(float(torch.rand(())))
            return (w * batch).mean()

        alone = fm.Multilevel(fm.Level("w", noisy, torchopt.sgd(0.1)), parallel="data")
        alone.step(alone.init({"w": torch.ones(())}), {"w": torch.ones(2)})
        others: list[float] = [0.0] * mine.size
        dist.all_gather_object(others, drawn[0])
        tell(mine, "draws", {"different": len(set(others))})

        whole = {level: lambda t, level=level: batch(level, t) for level in ("weights", "points")}
        for name, response in {
            "forward gradient": fm.ForwardGradient(5),
            "forward gradient in chunks": fm.ForwardGradient(5, chunk=2),
            "forward gradient one by one": fm.ForwardGradient(5, chunk=1),
            "one sample": fm.ForwardGradient(1),
            "perturbed solve": fm.PerturbedSolve(6, scale=0.1),
        }.items():
            alone, shared = (regression(response, parallel) for parallel in (None, "samples"))
            expected = alone.hypergradient(first(alone), whole, of="points")
            came = shared.hypergradient(first(shared), whole, of="points")
            tell(mine, name, {"hypergradient": error(came, expected)}, bits=came)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
