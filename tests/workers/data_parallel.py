"""Run by torchrun: hypergradients of processes that share batches, beside those of one process that has all of them."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torchopt

import funcmlo as fm
from funcmlo import _tree
from tests.registry import ESTIMATORS
from tests.workers.tell import tell

SIZES = {"weights": 12, "points": 7, "prior": 9}
"""Examples of each level's batches; odd numbers are shared unevenly."""


WIDE = {
    "finite difference": fm.FiniteDifference(0.1),
    "sama": fm.SAMA(0.1),
    "perturbed solve": fm.PerturbedSolve(3, scale=0.1),
    "penalty": fm.Penalty(0.1, steps=10),
}
"""Differences over steps that leave rounding small."""


def outputs(w: dict, points: dict, batch: dict) -> torch.Tensor:
    """What a Gauss–Newton matrix takes its first derivatives of."""
    return batch["x"] @ w["w"] + w["b"] - batch["y"] * points["scale"].tanh()


def squares(residual: torch.Tensor, batch: dict) -> torch.Tensor:
    """What it takes the second derivatives of."""
    return (residual**2).mean() / 2


def batch(level: str, t: int) -> dict[str, torch.Tensor]:
    """A level's whole batch at a step."""
    generator = torch.Generator().manual_seed(100 * len(level) + t)
    x = torch.randn(SIZES[level], 3, generator=generator, dtype=torch.float64)
    y = torch.randn(SIZES[level], generator=generator, dtype=torch.float64)
    return {"x": x, "y": y}


def program(response: fm.BestResponse, parallel: str | None, composition: str = "paths") -> fm.Multilevel:
    """Ridge regression with learned regularization and a learned shift, anything but quadratic in the two together."""

    def train(w: dict, points: dict, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ w["w"] + w["b"] - batch["y"] * points["scale"].tanh()
        return (residual**2).mean() / 2 + (points["decay"].exp() * w["w"] ** 2).sum() / 2

    def valid(points: dict, weights: dict, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ weights["w"] + weights["b"] - batch["y"]
        return (residual**2).mean() + 0.1 * (points["decay"] ** 2).sum()

    return fm.Multilevel(
        fm.Level("weights", train, torchopt.sgd(0.1, momentum=0.5), steps=5, response=response),
        fm.Level("points", valid, torchopt.adam(0.05)),
        composition=composition,
        parallel=parallel,
    )


def three_levels(composition: str, parallel: str | None) -> fm.Multilevel:
    """A third level, whose parameters draw the second one's and whose cost reads both below."""

    def train(weights: dict, points: dict, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ weights["w"] + weights["b"] - batch["y"] * points["scale"].tanh()
        return (residual**2).mean() / 2 + (points["decay"].exp() * weights["w"] ** 2).sum() / 2

    def valid(points: dict, weights: dict, prior: torch.Tensor, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ weights["w"] + weights["b"] - batch["y"]
        return (residual**2).mean() + ((points["decay"] - prior) ** 2).sum() + (points["scale"] - prior.sum()) ** 2

    def test(prior: torch.Tensor, points: dict, weights: dict, batch: dict) -> torch.Tensor:
        residual = batch["x"] @ weights["w"] + weights["b"] - batch["y"]
        return (residual**2).mean() + 0.1 * (points["decay"] ** 2).sum() + 0.1 * (prior**2).sum()

    response = fm.AID(fm.CG(20, tol=1e-14))
    return fm.Multilevel(
        fm.Level("weights", train, torchopt.sgd(0.1), steps=5, response=response),
        fm.Level("points", valid, torchopt.sgd(0.05), steps=3, response=response),
        fm.Level("prior", test, torchopt.adam(0.05)),
        composition=composition,
        parallel=parallel,
    )


def first(of: fm.Multilevel) -> fm.State:
    """The first state."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, generator=generator, dtype=torch.float64)
    points = {"decay": torch.linspace(-1, 0, 3, dtype=torch.float64), "scale": torch.tensor(0.7, dtype=torch.float64)}
    given = {"weights": {"w": w, "b": torch.zeros((), dtype=torch.float64)}, "points": points}
    given["prior"] = torch.full((3,), -0.5, dtype=torch.float64)
    return of.init({name: given[name] for name in of.graph.levels})


def error(a: object, b: object) -> float:
    """The relative distance of two trees."""
    return float(_tree.norm(_tree.subtract(a, b)) / _tree.norm(b))


def compared(mine: fm.Processes, name: str, alone: fm.Multilevel, shared: fm.Multilevel) -> None:
    """Compare one hypergradient of the highest level and one step."""
    top = alone.graph.levels[-1]
    whole = {level: lambda t, level=level: batch(level, t) for level in alone.graph.levels}
    part = {level: lambda t, level=level: mine.share(batch(level, t)) for level in alone.graph.levels}
    state = first(alone)
    expected = alone.hypergradient(state, whole, of=top)
    came = shared.hypergradient(state, part, of=top)
    one, metrics = alone.step(state, whole)
    other, shared_metrics = shared.step(state, part)
    tell(
        mine,
        name,
        {
            "hypergradient": error(came, expected),
            "step": max(error(other.params[level], one.params[level]) for level in one.params),
            "cost": abs(float(metrics[top]["cost"] - shared_metrics[top]["cost"])),
        },
        bits=[other.params, other.optimizer, other.response, came],
    )


def at_the_end(mine: fm.Processes) -> None:
    """SAMA with a single exchange: the mean of what each process makes of its own examples, weighted by their number."""
    shared, alone = program(fm.SAMA(0.1, synchronize="end"), "data"), program(fm.SAMA(0.1), None)
    state, share = first(alone), {level: mine.share(batch(level, 0)) for level in alone.graph.levels}
    exchanges: list[int] = []
    plain = dist.all_reduce
    dist.all_reduce = lambda x, *rest, **how: exchanges.append(x.numel()) or plain(x, *rest, **how)
    try:
        came = shared.hypergradient(state, share, of="points", solve=False)
    finally:
        dist.all_reduce = plain
    own = []
    for rank in range(mine.size):
        there = fm.Processes(rank, mine.size, mine.device)
        part = {level: there.share(batch(level, 0)) for level in alone.graph.levels}
        own.append((len(part["points"]["y"]), alone.hypergradient(state, part, of="points", solve=False)))
    total = sum(n for n, _ in own)
    expected = _tree.map(
        lambda *leaves: sum(n * x for (n, _), x in zip(own, leaves, strict=True)) / total, *(g for _, g in own)
    )
    tell(mine, "sama at the end", {"hypergradient": error(came, expected), "exchanges": len(exchanges)}, bits=came)


def main() -> None:
    """Compare every estimator of the registry, and what it does not hold."""
    with fm.processes() as mine:
        responses = {name: make(6.0, 4) for name, make in ESTIMATORS.items()}
        responses |= {f"{name}, a wide step": response for name, response in WIDE.items()}
        responses["Gauss–Newton"] = fm.AID(fm.Direct(), curvature=fm.GaussNewton(outputs, squares))
        for name, response in responses.items():
            compared(mine, name, program(response, None), program(response, "data"))
        nested = [program(fm.ITD(), parallel, "nested") for parallel in (None, "data")]
        compared(mine, "nested ITD", *nested)
        for composition in ("paths", "nested"):
            three = [three_levels(composition, parallel) for parallel in (None, "data")]
            compared(mine, f"three levels: {composition}", *three)
        at_the_end(mine)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "composition=.paths. is not the total derivative", fm.FuncmloWarning)
    main()
