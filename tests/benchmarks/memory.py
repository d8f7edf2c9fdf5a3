"""Peak memory of ITD's modes against the number of inner steps, each cell in a fresh process.

    python -m tests.benchmarks.memory [--preset smoke] [--figure docs/itd-memory.png]

A cell is one hypergradient; its peak is the process's VmHWM less its resident memory after set-up and a warm-up. Not a
child's ru_maxrss, which begins at its parent's. Seconds are of the processor, once: rough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from paper_repro import peak
from paper_repro.peak import reset_peak, resident

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **peak.QUIET}
MB = 1e6

MODES = {
    "store": "ITD()",
    "recompute": "ITD(memory='recompute')",
    "mixed": "ITD(memory='mixed')",
    "Checkpoint()": "ITD(memory=Checkpoint())",
    "Checkpoint(arity=2)": "ITD(memory=Checkpoint(arity=2))",
    "Checkpoint(arity=4)": "ITD(memory=Checkpoint(arity=4))",
    "Checkpoint(mixed=True)": "ITD(memory=Checkpoint(mixed=True))",
    "forward": "ITD(mode='forward')",
    "ForwardGradient(2)": "ForwardGradient(samples=2)",
}


def halvings(steps: int, arity: int) -> int:
    """⌈log_k T⌉, how often a loop is cut into k until its parts are single steps."""
    return 0 if steps <= 1 else 1 + halvings(-(-steps // arity), arity)


AT, DEEP = 4, (64, *[160] * 11, 10)
"""The T and the net for large batches: one step's activations should be most of the memory."""
LEAST = 2  # the T whose peak is taken for the constant: in a first step there is no tangent yet

CLAIMS: dict[str, tuple[str, Callable[[int], float]]] = {
    "store": ("T", lambda t: t),
    "recompute": ("T", lambda t: t),
    "mixed": ("T", lambda t: t),
    "Checkpoint()": ("2√T", lambda t: min(t, 2 * math.sqrt(t))),
    "Checkpoint(arity=2)": ("2 log₂T", lambda t: min(t, 2 * halvings(t, 2))),
    "Checkpoint(arity=4)": ("4 log₄T", lambda t: min(t, 4 * halvings(t, 4))),
    "forward": ("flat", lambda t: 0),
    "ForwardGradient(2)": ("flat", lambda t: 0),
}


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    mode: str
    steps: int
    optimizer: str = "sgd"
    batch: int = 32
    layers: tuple[int, ...] = (64, 320, 320, 10)


@dataclass(frozen=True)
class Measured:
    """What it found: peak bytes above the start, seconds, the hypergradient, and the bytes of the parameters."""

    peak: int
    seconds: float
    gradient: list[float]
    parameters: int


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference, relative to the largest entry."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(map(abs, b))


def fresh(module: str, arguments: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Run `python -m module --child arguments` and return the JSON that it prints last."""
    command = [sys.executable, "-m", module, "--child", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def problem(response: Any, optimizer: Any, steps: int, layers: Sequence[int], batch: int) -> tuple[Any, Any, dict[str, Any]]:
    """A student net with a weight decay for each layer, learned on a validation set; batches are made by their step."""
    import torch
    import torch.nn.functional as F

    import funcmlo as fm

    torch.manual_seed(0)
    pieces: list[torch.nn.Module] = []
    for inner, outer in pairwise(layers):
        pieces += [torch.nn.Linear(inner, outer), torch.nn.Tanh()]
    net = fm.Stateless(torch.nn.Sequential(*pieces[:-1]))
    teacher = torch.randn(layers[0], layers[-1])

    def draw(t: int, size: int = batch) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(size, layers[0], generator=torch.Generator().manual_seed(t))
        return x, (x @ teacher).argmax(1)

    weights = [name for name in net.params() if name.endswith("weight")]

    def train(student: dict[str, torch.Tensor], decay: torch.Tensor, batch: Any) -> torch.Tensor:
        x, y = batch
        norms = torch.stack([student[name].square().sum() for name in weights])
        return F.cross_entropy(net(student, x), y) + (decay.exp() * norms).sum()

    held_out = draw(10**9, 64)

    def valid(decay: torch.Tensor, student: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(net(student, held_out[0]), held_out[1])

    # What is measured is a step as it is written; small ones that are replayed take less.
    student = fm.Level("student", train, optimizer, steps=steps, response=response, replay=False)
    program = fm.Multilevel(student, fm.Level("decay", valid, optimizer))
    return program, program.init({"student": net.params(), "decay": torch.full((len(weights),), -7.0)}), {"student": draw}


def measure(cell: Cell) -> Measured:
    """Measure a cell in this process."""
    import torch
    import torchopt

    import funcmlo as fm

    torch.set_num_threads(1)
    optimizer = torchopt.sgd(0.1) if cell.optimizer == "sgd" else torchopt.adam(1e-3)
    response = eval(MODES[cell.mode], {name: getattr(fm, name) for name in ("ITD", "Checkpoint", "ForwardGradient")})
    warm, state, batches = problem(response, optimizer, 2, cell.layers, 8)
    warm.hypergradient(state, batches, of="decay")
    program, state, batches = problem(response, optimizer, cell.steps, cell.layers, cell.batch)
    del warm
    start = reset_peak()
    begin = time.process_time()
    gradient = program.hypergradient(state, batches, of="decay")
    seconds = time.process_time() - begin
    size = sum(x.numel() * x.element_size() for x in state.params["student"].values())
    return Measured(resident("VmHWM") - start, seconds, gradient.tolist(), size)


def cell(**settings: Any) -> Measured:
    """Measure a cell in a process of its own."""
    return Measured(**fresh("tests.benchmarks.memory", asdict(Cell(**settings)), QUIET))


def against_steps(modes: Sequence[str], optimizer: str, steps: Sequence[int]) -> dict[str, dict[int, Measured]]:
    """Measure every mode at every T, and print what came out."""
    found = {name: {t: cell(mode=name, steps=t, optimizer=optimizer) for t in (LEAST, *steps)} for name in modes}
    size = found["recompute"][LEAST].parameters
    print(f"\n{optimizer}: peak MB above the start against T, p = {size / MB:.2f} MB of parameters, batches of {Cell.batch}")
    table(found, (LEAST, *steps), lambda m, t: f"{m.peak / MB:.1f}")
    print(f"\n{optimizer}: seconds relative to recompute's at the same T, rough")
    table(found, steps, lambda m, t: f"{m.seconds / found['recompute'][t].seconds:.2f}")
    print(f"\n{optimizer}: growth of peak(T) − peak({LEAST}), in brackets as claimed; where the claim is flat, of peak(T)")
    print(f"{'':24}" + "".join(f"{f'{a} → {b}':>18}" for a, b in pairwise(steps)) + "  claim")
    for name, row in found.items():
        law, count = CLAIMS[name]
        cells = [growth({t: m.peak for t, m in row.items()}, count, a, b) for a, b in pairwise(steps)]
        print(f"{name:24}" + "".join(f"{text:>18}" for text in cells) + f"  {law}")
    exact = [row for name, row in found.items() if name != "ForwardGradient(2)"]
    most = max(apart(row[t].gradient, found["recompute"][t].gradient) for row in exact for t in row)
    print(f"the answers differ by {most:.0e} at most, of the largest entry (ForwardGradient aside)")
    return found


def growth(peaks: dict[int, int], count: Callable[[int], float], a: int, b: int) -> str:
    """How the peak grew from T = a to b beside how it should."""
    if not count(b):
        return f"{peaks[b] / peaks[a]:.2f} (1.00)"
    claim = (count(b) - count(LEAST)) / (count(a) - count(LEAST))
    return f"{(peaks[b] - peaks[LEAST]) / (peaks[a] - peaks[LEAST]):.2f} ({claim:.2f})"


def against_batch(modes: Sequence[str], batches: Sequence[int]) -> dict[str, dict[int, Measured]]:
    """Measure few steps of a deep net with growing batches: what one step takes."""
    found = {name: {size: cell(mode=name, steps=AT, batch=size, layers=DEEP) for size in batches} for name in modes}
    print(f"\nsgd: peak MB above the start against the batch, T = {AT}, {len(DEEP) - 1} layers")
    table(found, batches, lambda m, size: f"{m.peak / MB:.1f}")
    return found


def table(found: dict[str, dict[int, Measured]], columns: Sequence[int], text: Callable[[Measured, int], str]) -> None:
    """Print one row for each mode."""
    print(f"{'':24}" + "".join(f"{column:>10}" for column in columns))
    for name, row in found.items():
        print(f"{name:24}" + "".join(f"{text(row[c], c):>10}" for c in columns))


STYLES = {
    "store": ("black", "o", "-"),
    "recompute": ("C0", "s", "-"),
    "mixed": ("C1", "D", "--"),
    "Checkpoint()": ("C2", "^", "-"),
    "Checkpoint(mixed=True)": ("C2", "v", "--"),
    "Checkpoint(arity=4)": ("C3", "P", "-."),
    "Checkpoint(arity=2)": ("C4", "X", ":"),
    "forward": ("C5", "*", "-"),
    "ForwardGradient(2)": ("0.5", "h", ":"),
}


def draw_figure(path: Path, by_steps: dict[str, dict[int, Measured]], by_batch: dict[str, dict[int, Measured]]) -> None:
    """Draw the peaks against T and against the batch; markers and lines tell the modes apart in black and white."""
    import matplotlib.pyplot as plt

    from paper_repro.results import FIGURE_STYLE

    with plt.rc_context(FIGURE_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 5.4), layout="constrained")
        for axis, found in zip(axes, (by_steps, by_batch), strict=True):
            for name, row in found.items():
                colour, marker, line = STYLES[name]
                points = [c for c in sorted(row) if c != LEAST]
                face, size = ("none", 10) if line == "--" else (colour, 7)  # mixed modes lie upon others
                peaks = [row[c].peak / MB for c in points]
                axis.loglog(points, peaks, line, color=colour, marker=marker, mfc=face, ms=size, label=name)
            axis.set_xticks(points, [str(c) for c in points])
            axis.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
            axis.grid(color="0.9")
        axes[0].set(xlabel="inner steps T", ylabel="peak memory above the start, MB")
        megabytes = by_steps["recompute"][LEAST].parameters / MB
        axes[0].set_title(f"Long loops: batches of {Cell.batch}, {megabytes:.1f} MB of parameters")
        axes[1].set(xlabel="examples in a batch", title=f"Large batches: {AT} inner steps, {len(DEEP) - 1} layers")
        handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        handles = {name: handles[name] for name in STYLES if name in handles}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path)
        plt.close(figure)


PRESETS: dict[str, dict[str, Any]] = {
    "full": {
        "modes": list(CLAIMS),
        "steps": {"sgd": (16, 64, 256, 1024), "adam": (64, 256)},
        "large": ["store", "recompute", "mixed", "Checkpoint()", "Checkpoint(mixed=True)"],
        "batches": (64, 512, 4096),
    },
    "smoke": {"modes": ["recompute"], "steps": {"sgd": (8, 32)}, "large": ["mixed"], "batches": (64,)},
}


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--figure", type=Path, help="where to draw the peaks, a PNG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return print(json.dumps(asdict(measure(Cell(**json.loads(options.child))))))
    preset = PRESETS[options.preset]
    by_steps = {kind: against_steps(preset["modes"], kind, steps) for kind, steps in preset["steps"].items()}
    by_batch = against_batch(preset["large"], preset["batches"])
    if options.figure:
        draw_figure(options.figure, by_steps["sgd"], by_batch)


if __name__ == "__main__":
    main()
