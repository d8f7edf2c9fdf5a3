"""What a warm start saves: Hessian-vector products of a real hyper-cleaning run, cold and warm, to one relative residual.

Run it with `python -m tests.benchmarks.warm_start`. Both runs solve every outer step's system to 10⁻³ with the same damping,
so they follow the same trajectory to that accuracy; the table gives the products of an outer step, averaged over all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
import torchopt

import funcmlo as fm
from paper_repro import data
from paper_repro.hypercleaning.problem import draw
from paper_repro.hypercleaning.run import PRESETS

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        products: Hessian-vector products of each outer step.
        residual: the largest relative residual that a solve ended at.
        cost: the upper cost at the end.
    """

    products: list[int]
    residual: float
    cost: float

    @property
    def mean(self) -> float:
        return sum(self.products) / len(self.products)


def measure(solver: fm.LinearSolver, *, warm: bool, steps: int, upper_lr: float, seed: int = 0) -> Measured:
    """Clean the digits' labels with one solver and count its products."""
    settings = PRESETS["cpu"]["digits"]
    problem = draw(data.load("digits"), settings, seed)
    program = fm.Multilevel(
        fm.Level(
            "classifier",
            problem.lower,
            torchopt.sgd(settings.lower_lr, momentum=0.9),
            steps=settings.inner,
            response=fm.AID(solver, warm_start=warm),
        ),
        fm.Level("weights", problem.upper, torchopt.adam(upper_lr)),
    )
    state = program.init({"classifier": problem.classifier(), "weights": torch.zeros(settings.train)}, seed=seed)
    products, residual, cost = [], 0.0, 0.0
    for _ in range(steps):
        state, metrics = program.step(state, {})
        stats = metrics["weights"]["stats"]["classifier"]
        products.append(stats.hvps)
        residual, cost = max(residual, stats.residual), float(metrics["weights"]["cost"])
    return Measured(products, residual, cost)


SOLVERS = {
    "CG": fm.CG(500, tol=TOLERANCE),
    "CG, damping 1e-3": fm.CG(500, tol=TOLERANCE, damping=1e-3),
    "CG, damping 1e-2": fm.CG(500, tol=TOLERANCE, damping=1e-2),
    "MINRES": fm.MINRES(500, tol=TOLERANCE),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="outer steps")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the problem")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"hyper-cleaning of digits, {arguments.steps} outer steps, products of an outer step at residual {TOLERANCE:g}")
    columns = ("upper rate", 10), ("cold", 7), ("warm", 7), ("ratio", 6), ("largest residual", 17), ("cost, cold / warm", 19)
    print(f"{'solver':<18}", *(f"{name:>{width}}" for name, width in columns))
    for name, solver in SOLVERS.items():
        for rate in (0.1, 0.03):
            for seed in range(arguments.seeds):
                cold, warm = (
                    measure(replace(solver), warm=on, steps=arguments.steps, upper_lr=rate, seed=seed)
                    for on in (False, True)
                )
                print(
                    f"{name:<18} {rate:>10g} {cold.mean:>7.1f} {warm.mean:>7.1f} {warm.mean / cold.mean:>6.2f} "
                    f"{max(cold.residual, warm.residual):>17.1e} {cold.cost:>10.4f} {warm.cost:>8.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
