"""What `program.run` costs beside the same steps written by hand, and whether thousands of them leak.

Run it with `python -m tests.benchmarks.run_loop`. The program is hyper-cleaning of a 784-512-512-10 network with batches of
256, 10 inner steps for each outer one. Three loops make the same steps from the same loaders: `run`, with its history, bar
and checkpoints off and on; `program.step` in a loop; and torch.autograd written by hand. They take turns in one process, so
that the figures are ratios of medians from one run. The leak is looked for in a fresh process.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchopt
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import funcmlo as fm
from funcmlo import table

BATCH, INNER, RATE = 256, 10, 0.1


def shapes() -> dict[str, tuple[int, ...]]:
    """The network's parameters."""
    sizes = (784, 512, 512, 10)
    found: dict[str, tuple[int, ...]] = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        found |= {f"w{i}": (b, a), f"b{i}": (b,)}
    return found


def network(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """A multilayer perceptron."""
    for i in range(2):
        x = torch.relu(F.linear(x, params[f"w{i}"], params[f"b{i}"]))
    return F.linear(x, params["w2"], params["b2"])


def train(classifier: dict[str, Tensor], weights: Tensor, batch: list[Tensor]) -> Tensor:
    """The weighted cost."""
    x, y, index = batch
    return (torch.sigmoid(weights[index]) * F.cross_entropy(network(classifier, x), y, reduction="none")).mean()


def valid(weights: Tensor, classifier: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
    """The validation cost."""
    return F.cross_entropy(network(classifier, batch[0]), batch[1])


def problem() -> tuple[fm.Multilevel, fm.State, dict[str, DataLoader]]:
    """The program, its first state and its loaders."""
    generator = torch.Generator().manual_seed(0)
    n = 2048
    x, y = torch.randn(n, 784, generator=generator), torch.randint(0, 10, (n,), generator=generator)
    program = fm.Multilevel(
        fm.Level("classifier", train, torchopt.sgd(RATE), steps=INNER, response=fm.AID(fm.CG(5, damping=1.0))),
        fm.Level("weights", valid, torchopt.sgd(RATE)),
    )
    params = {name: 0.03 * torch.randn(shape, generator=generator) for name, shape in shapes().items()}
    state = program.init({"classifier": params, "weights": torch.zeros(n)})
    loaders = {
        "classifier": DataLoader(TensorDataset(x, y, torch.arange(n)), batch_size=BATCH, shuffle=True),
        "weights": DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True),
    }
    return program, state, loaders


def cycled(loader: DataLoader) -> Iterator[list[Tensor]]:
    """A loader's batches without end."""
    while True:
        yield from loader


def by_hand(steps: int) -> Callable[[], object]:
    """The same program in torch.autograd."""
    _, state, loaders = problem()
    names = list(state.params["classifier"])

    def go() -> object:
        params = [x.clone().requires_grad_() for x in state.params["classifier"].values()]
        weights = state.params["weights"].clone().requires_grad_()
        lower, upper = cycled(loaders["classifier"]), cycled(loaders["weights"])
        for _ in range(steps):
            for _ in range(INNER):
                batch = next(lower)
                grads = torch.autograd.grad(train(dict(zip(names, params, strict=True)), weights, batch), params)
                params = [(p - RATE * g).detach().requires_grad_() for p, g in zip(params, grads, strict=True)]
            inner = train(dict(zip(names, params, strict=True)), weights, batch)
            slope = torch.autograd.grad(inner, params, create_graph=True)
            outer = valid(weights, dict(zip(names, params, strict=True)), next(upper))
            v = torch.autograd.grad(outer, params)
            w = conjugate_gradients(slope, params, v, 5, 1.0)
            (cross,) = torch.autograd.grad(slope, weights, w)
            weights = (weights + RATE * cross).detach().requires_grad_()
        return weights

    return go


def conjugate_gradients(
    slope: tuple[Tensor, ...], params: list[Tensor], v: tuple[Tensor, ...], iterations: int, damping: float
) -> list[Tensor]:
    """CG on (H + damping) w = v, for the Hessian H whose gradient is `slope`."""
    x, r = [torch.zeros_like(a) for a in v], [a.clone() for a in v]
    p, rr = [a.clone() for a in v], sum((a * a).sum() for a in v)
    for _ in range(iterations):
        hp = [a + damping * b for a, b in zip(torch.autograd.grad(slope, params, p, retain_graph=True), p, strict=True)]
        alpha = rr / sum((a * b).sum() for a, b in zip(p, hp, strict=True))
        torch._foreach_add_(x, [alpha * a for a in p])
        torch._foreach_sub_(r, [alpha * a for a in hp])
        new = sum((a * a).sum() for a in r)
        p = [a + new / rr * b for a, b in zip(r, p, strict=True)]
        rr = new
    return x


def by_step(steps: int) -> Callable[[], object]:
    """`program.step` in a loop."""
    program, first, loaders = problem()

    def go() -> object:
        state, data = first, {name: cycled(loader) for name, loader in loaders.items()}
        for _ in range(steps):
            state, _ = program.step(state, data)
        return state

    return go


def by_run(steps: int, *, progress: bool, checkpoint: bool) -> Callable[[], object]:
    """`program.run`."""
    program, first, loaders = problem()

    def go() -> object:
        with tempfile.TemporaryDirectory() as folder:
            place = folder if checkpoint else None
            return program.run(first, loaders, steps=steps, progress=progress, checkpoint=place, every=100)

    return go


def leak(steps: int) -> None:
    """Print the resident memory after a warm-up and at the end of a long run of a small program, in a fresh process."""
    data = TensorDataset(torch.randn(64, 16), torch.randn(64))
    program = fm.Multilevel(
        fm.Level(
            "w",
            lambda w, decay, batch: ((batch[0] @ w - batch[1]) ** 2).mean() + decay.exp() * (w**2).sum(),
            torchopt.adam(0.01),
            steps=2,
            response=fm.AID(fm.CG(3), warm_start=True),
        ),
        fm.Level("decay", lambda decay, w, batch: ((batch[0] @ w - batch[1]) ** 2).mean(), torchopt.adam(0.01)),
    )
    loaders = {name: DataLoader(data, batch_size=16, shuffle=True) for name in ("w", "decay")}
    state = program.init({"w": torch.zeros(16), "decay": torch.zeros(())})
    with tempfile.TemporaryDirectory() as folder:
        _, history = program.run(state, loaders, steps=steps, progress=False, checkpoint=folder, every=500)
    memory = history["memory"]
    early, late = memory[steps // 10], memory.iloc[-1]
    then = f"{steps // 10:,} ({early / 2**20:.0f} MiB)"
    print(f"{steps:,} steps: resident memory at the end is {late / early:.4f} of that after {then}")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10, help="outer steps of each turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--leak", type=int, default=5000, help="outer steps of the leak test")
    parser.add_argument("--only-leak", action="store_true")
    asked = parser.parse_args()
    if asked.only_leak:
        leak(asked.leak)
        return
    loops = {
        "torch.autograd by hand": by_hand(asked.steps),
        "program.step in a loop": by_step(asked.steps),
        "program.run": by_run(asked.steps, progress=False, checkpoint=False),
        "program.run, bar and checkpoints": by_run(asked.steps, progress=True, checkpoint=True),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for go in loops.values():
        go()
    for _ in range(asked.rounds):
        for name, go in loops.items():
            begin = time.perf_counter()
            go()
            times[name].append(time.perf_counter() - begin)
    base = {name: statistics.median(found) for name, found in times.items()}
    rows = [
        [name, f"{base[name] / base['torch.autograd by hand']:.3f}", f"{base[name] / base['program.step in a loop']:.3f}"]
        for name in loops
    ]
    print(table.text([table.Column("loop", left=True), table.Column("to by hand"), table.Column("to program.step")], rows))
    subprocess.run([sys.executable, "-m", "tests.benchmarks.run_loop", "--only-leak", "--leak", str(asked.leak)], check=True)


if __name__ == "__main__":
    main()
