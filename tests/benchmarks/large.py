"""Copies of the parameters that a hypergradient takes, with many parameters and few hyperparameters.

    python -m tests.benchmarks.large [--preset smoke]

Each row is one hypergradient in a fresh process: its VmHWM less its resident memory before the call, divided by the bytes of
the parameters. The parameters and the state were there before and do not count; with `solve=True` the parameters after the
inner step are one of the copies. The lower cost is Σ_l ½ e^{x_0} ‖y_l‖² + (1ᵀy_l)² / 2n_l − x_1 1ᵀy_l over the tensors y_l:
its graph keeps nothing besides the parameters, and a product with its Hessian takes one more tensor besides its answer. What
a network's activations take comes on top. The answer is checked against the closed form.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

from tests.benchmarks.memory import QUIET, fresh, reset_peak, resident

ESTIMATORS = {
    "AID(CG(5, tol=0.0))": (6, True),
    "AID(CG(5, tol=0.0), curvature=Hessian('recompute'))": (8, True),
    "AID(Neumann(20, scale=0.5))": (6, True),
    "FiniteDifference()": (3, False),
}
"""The most copies, and whether the answer is the implicit one; a finite difference takes the identity for the Hessian."""
PRESETS: dict[str, dict[str, Any]] = {
    "full": {"parameters": 100_000_000, "tensors": (10, 1)},
    "smoke": {"parameters": 2_000_000, "tensors": (10,)},
}


@dataclass(frozen=True)
class Case:
    """What one process measures: an estimator, a number of parameters in some tensors, and whether a step is made first."""

    estimator: str
    parameters: int
    tensors: int
    solve: bool = False


def problem(case: Case, parameters: int) -> tuple[Any, Any]:
    """The program, and its first state: y_l = cos(i/100), x = 0."""
    import torch
    import torchopt

    import funcmlo as fm

    def square(y: torch.Tensor) -> torch.Tensor:
        return (y * y).sum()

    def lower(y: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        costs = (0.5 * x[0].exp() * square(one) + 0.5 * one.sum() ** 2 / one.numel() - x[1] * one.sum() for one in y)
        return torch.stack(list(costs)).sum()

    def upper(x: torch.Tensor, y: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([0.5 * square(one) - one.sum() for one in y]).sum() / parameters

    names = {name: getattr(fm, name) for name in ("AID", "CG", "Neumann", "FiniteDifference")}
    response = eval(case.estimator, {**names, "Hessian": fm.Hessian})
    program = fm.Multilevel(
        fm.Level("y", lower, torchopt.sgd(0.5), response=response), fm.Level("x", upper, torchopt.sgd(0.1))
    )
    size = parameters // case.tensors
    y = [torch.arange(size, dtype=torch.float32).mul_(0.01).cos_() for _ in range(case.tensors)]
    return program, program.init({"y": y, "x": torch.zeros(2)})


def expected(case: Case, y: Any, implicit: bool) -> list[float]:
    """−∇²_xy g · H⁻¹v, or −∇²_xy g · v: at x = 0, H is 1 + 11ᵀ/n_l, and v_l = (y_l − 1)/n."""
    first = second = 0.0
    for one in y:
        sum_y, sum_yy, n = float(one.double().sum()), float((one.double() ** 2).sum()), one.numel()
        mean = (sum_y - n) / n / case.parameters  # of v
        along = mean / 2 if implicit else mean  # of w: 11ᵀ/n doubles what lies along 1
        first -= (sum_yy - sum_y) / case.parameters - (mean - along) * sum_y
        second += n * along
    return [first, second]


def measure(case: Case) -> dict[str, float]:
    """Measure a case in this process."""
    import torch

    torch.set_num_threads(1)
    small, state = problem(case, 20 * 2**15)  # large enough for all paths to be taken once
    small.hypergradient(state, {}, of="x", solve=case.solve)
    del small, state
    program, state = problem(case, case.parameters)
    start = reset_peak()
    begin = time.perf_counter()
    gradient = program.hypergradient(state, {}, of="x", solve=case.solve)
    seconds = time.perf_counter() - begin
    copies = (resident("VmHWM") - start) / (4 * case.parameters)
    error = math.nan
    if not case.solve:
        answer = expected(case, state.params["y"], ESTIMATORS[case.estimator][1])
        error = max(abs(a - b) / abs(b) for a, b in zip(gradient.tolist(), answer, strict=True))
    return {"copies": copies, "seconds": seconds, "error": error}


def run(case: Case) -> dict[str, float]:
    """The same in a process of its own."""
    return fresh("tests.benchmarks.large", asdict(case), QUIET)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(Case(**json.loads(options.child)))))
        return
    preset = PRESETS[options.preset]
    for tensors in preset["tensors"]:
        print(f"{preset['parameters']:,} float32 parameters in {tensors} tensor{'s' * (tensors > 1)}, 2 hyperparameters")
        print(f"{'':54}{'copies':>8}{'at most':>9}{'after a step':>14}{'seconds':>9}{'error':>9}")
        for name, (most, _) in ESTIMATORS.items():
            found, stepped = (run(Case(name, preset["parameters"], tensors, solve)) for solve in (False, True))
            row = f"{found['copies']:8.2f}{most:9}{stepped['copies']:14.2f}{found['seconds']:9.1f}{found['error']:9.0e}"
            print(f"{name:54}{row}", flush=True)


if __name__ == "__main__":
    main()
