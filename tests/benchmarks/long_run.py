"""A long inner loop in little memory: 10,000 steps of a net of a million parameters, `python -m tests.benchmarks.long_run`.

Each run is a fresh process, and its peak is all that it ever took (VmHWM), the interpreter and torch included; seconds are
of the processor, on one thread. The answer is checked over fewer steps, against two modes that replay nothing: forward mode
along one direction, and a recorded graph.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from paper_repro.peak import resident
from tests.benchmarks.memory import MB, apart, fresh, problem

LIMIT = 2e9
"""Bytes that a process may take."""

QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
RUNS = {
    "sgd": "Checkpoint()",  # 2 · 100 standings of p
    "adam": "Checkpoint(arity=22)",  # 22³ > 10,000: three depths of 22 standings of 3p, where 200 of them are 2.4 GB
}
PRESETS = {"full": (10_000, 1000, 100, (256, 800, 800, 192)), "smoke": (64, 32, 16, (16, 32, 32, 4))}
"""The numbers of steps: of the run, of the check by forward mode, and of that by a recorded graph; and the net's layers."""


def hypergradient(response: str, optimizer: str, steps: int, layers: list[int]) -> dict[str, Any]:
    """Take one hypergradient in this process."""
    import torch
    import torchopt

    import funcmlo as fm

    torch.set_num_threads(1)
    kinds = {"sgd": torchopt.sgd(0.05), "adam": torchopt.adam(1e-4)}
    known = {name: getattr(fm, name) for name in ("ITD", "Checkpoint", "ForwardGradient")}
    program, state, batches = problem(eval(response, known), kinds[optimizer], steps, layers, 8)
    begin = time.process_time()
    gradient, stats = program.hypergradient(state, batches, of="decay", with_stats=True)
    return {
        "seconds": time.process_time() - begin,
        "gradient": gradient.double().tolist(),
        "steps": stats["student"].steps,
        "replayed": stats["student"].replayed,
        "parameters": sum(x.numel() for x in state.params["student"].values()),
        "peak": resident("VmHWM"),
    }


def run(response: str, optimizer: str, steps: int, layers: tuple[int, ...]) -> dict[str, Any]:
    """The same in a process of its own."""
    settings = {"response": response, "optimizer": optimizer, "steps": steps, "layers": layers}
    return fresh("tests.benchmarks.long_run", settings, QUIET)


def along(gradient: list[float], probe: list[float]) -> float:
    """How far ⟨a, r⟩ is from what forward mode says, relative to Σ|a_i|: the probe is ⟨a, r⟩ r with signs r."""
    size = abs(probe[0])
    signs = [x / size for x in probe]
    slopes = (sum(a * r for a, r in zip(gradient, s, strict=True)) for s in (signs, [-r for r in signs]))
    return min(abs(slope - size) for slope in slopes) / sum(map(abs, gradient))


def main() -> None:
    """Run both, and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(hypergradient(**json.loads(options.child))))
        return
    steps, fewer, fewest, layers = PRESETS[options.preset]
    for optimizer, memory in RUNS.items():
        found = run(f"ITD(memory={memory})", optimizer, steps, layers)
        verdict = "within" if found["peak"] <= LIMIT else "BEYOND"
        print(f"{optimizer}, {found['parameters']:,} parameters, ITD(memory={memory}), T = {steps:,}")
        print(f"  peak {found['peak'] / MB:,.0f} MB, {verdict} the limit of {LIMIT / MB:,.0f} MB")
        print(
            f"  {found['seconds']:.0f} s; steps differentiated {found['steps']:,}, replayed {found['replayed']:,}",
            flush=True,
        )
        recorded = run("ITD()", optimizer, fewest, layers)
        for other in (memory, "Checkpoint(arity=3)"):
            difference = apart(run(f"ITD(memory={other})", optimizer, fewest, layers)["gradient"], recorded["gradient"])
            print(f"  T = {fewest}: {other} and memory='store' differ by {difference:.0e}", flush=True)
        shorter = run(f"ITD(memory={memory})", optimizer, fewer, layers)
        probe = run("ForwardGradient(samples=1, chunk=1)", optimizer, fewer, layers)
        difference = along(shorter["gradient"], probe["gradient"])
        print(f"  T = {fewer}: {memory} and forward mode along one direction differ by {difference:.0e}", flush=True)


if __name__ == "__main__":
    main()
