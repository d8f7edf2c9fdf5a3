"""Runs that are killed at random moments and go on, beside one that is not; in forked children, so that a trial is quick."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchopt
from torch import nn
from torch.utils.data import DataLoader, Dataset

import funcmlo as fm
from funcmlo.train.checkpoint import load, newest
from tests.workers.tell import MARK, digest

STEPS, EVERY, KILLS = 20, 1, 50


class Noisy(Dataset):
    """Examples that are drawn anew with each look at them."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 4, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """Return one."""
        x = self.x[i] + 0.1 * torch.randn(4, dtype=torch.float64) + 0.1 * random.random()
        return {"x": x, "y": x.sum()}


def begin() -> tuple[fm.Multilevel, fm.State, dict[str, DataLoader]]:
    """Adam, dropout, BatchNorm, shuffled loaders with random transforms, and a warm-started solver."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    net = fm.Stateless(module.double())

    def train(weights: dict, decay: torch.Tensor, batch: dict, buffers: dict) -> tuple[torch.Tensor, dict]:
        out, new = net(weights, batch["x"], buffers=buffers)
        penalty = sum((w**2).sum() for w in weights.values())
        return F.mse_loss(out[:, 0], batch["y"]) + decay.exp() * penalty, {"buffers": new}

    def valid(decay: torch.Tensor, weights: dict, batch: dict, weights_buffers: dict) -> torch.Tensor:
        out, _ = net.eval()(weights, batch["x"], buffers=weights_buffers)
        return F.mse_loss(out[:, 0], batch["y"]) + 0.01 * decay**2

    response = fm.AID(fm.CG(5, tol=1e-6, damping=1.0), warm_start=True)
    program = fm.Multilevel(
        fm.Level("weights", train, torchopt.adam(0.02), steps=2, response=response),
        fm.Level("decay", valid, torchopt.adam(0.05)),
    )
    decay = torch.tensor(-4.0, dtype=torch.float64)
    state = program.init({"weights": net.params(), "decay": decay}, buffers={"weights": net.buffers()}, seed=3)
    loaders = {
        "weights": DataLoader(Noisy(22), batch_size=4, shuffle=True, drop_last=True),
        "decay": DataLoader(Noisy(9), batch_size=4, shuffle=True),
    }
    return program, state, loaders


def run(folder: Path | None, steps: int = STEPS) -> tuple[fm.State, object]:
    """One run, or what is left of it."""
    program, state, loaders = begin()
    return program.run(state, loaders, steps=steps, checkpoint=folder, every=EVERY, progress=False)


def bits(state: fm.State) -> str:
    """All bits of a state."""
    return digest([state.params, state.optimizer, state.response, state.buffers]) + json.dumps(state.step)


def child(folder: Path, steps: int) -> int:
    """Start a run in a child; return its process number."""
    pid = os.fork()
    if pid == 0:
        try:
            run(folder, steps)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def main(seed: int) -> None:
    """Kill, look, go on."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    expected, history = run(None)
    root = Path(tempfile.mkdtemp())
    begun = time.perf_counter()
    os.waitpid(child(root / "timed", STEPS), 0)
    whole = time.perf_counter() - begun
    kills, finished, wrong, writing, steps = 0, 0, [], 0, set()
    while kills < KILLS and not wrong:
        folder = root / f"run{finished}"
        before = newest(folder) if folder.exists() else None
        pid = child(folder, STEPS)
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.WEXITSTATUS(status):
            wrong.append("a run that went on failed")
        writing += any(folder.glob(".step-*"))
        after = newest(folder) if folder.exists() else None
        if before is not None and (after is None or after.name < before.name):
            wrong.append("a checkpoint was lost")
        if after is not None:
            try:
                steps.add(load(after, begin()[1]).step)
            except fm.CheckpointError as error:
                wrong.append(str(error))
        if after is not None and after.name == f"step-{STEPS:08}":
            state, rows = run(folder)
            wrong += [] if bits(state) == bits(expected) else ["other bits"]
            drop = [name for name in history if name.endswith(("seconds", "memory"))]
            wrong += [] if rows.drop(columns=drop).equals(history.drop(columns=drop)) else ["another history"]
            finished += 1
    folder = root / f"run{finished}"
    wrong += [] if bits(run(folder)[0]) == bits(expected) else ["other bits at the end"]
    shutil.rmtree(root)
    told = {"name": "kills", "kills": kills, "wrong": wrong, "finished": finished, "writing": writing, "steps": len(steps)}
    print(MARK + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
