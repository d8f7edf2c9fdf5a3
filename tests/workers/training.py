"""Run by torchrun or alone: one script that trains, is told to fail in one process, and goes on when it is started again."""

from __future__ import annotations

import argparse
import json
import os
import signal
import warnings
from pathlib import Path

import torch
import torchopt
from torch.utils.data import DataLoader, TensorDataset

import funcmlo as fm
from funcmlo import _tree
from tests.workers.task_parallel import TASKS
from tests.workers.task_parallel import program as meta_program
from tests.workers.tell import tell


def regression(parallel: str | None) -> tuple[fm.Multilevel, fm.State, dict[str, DataLoader]]:
    """Ridge regression with a learned penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(26, 3, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x.sum(1) + 0.1 * torch.randn(26, generator=generator, dtype=torch.float64))

    def train(w: torch.Tensor, decay: torch.Tensor, batch: list) -> tuple[torch.Tensor, dict]:
        residual = batch[0] @ w - batch[1]
        return (residual**2).mean() / 2 + decay.exp() * (w**2).sum(), {"largest": residual.detach().abs().mean()}

    def valid(decay: torch.Tensor, w: torch.Tensor, batch: list) -> torch.Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean() + 0.01 * decay**2

    program = fm.Multilevel(
        fm.Level("w", train, torchopt.adam(0.05), steps=3, response=fm.AID(fm.CG(5), warm_start=True)),
        fm.Level("decay", valid, torchopt.adam(0.05)),
        parallel=parallel,
    )
    state = program.init({"w": torch.zeros(3, dtype=torch.float64), "decay": torch.tensor(-2.0, dtype=torch.float64)})
    return program, state, {level: DataLoader(data, batch_size=5, shuffle=True, drop_last=True) for level in ("w", "decay")}


def learning(parallel: str | None) -> tuple[fm.Multilevel, fm.State, dict[str, DataLoader]]:
    """Meta-learning over tasks that go on from where they stood."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(
        torch.randn(4 * TASKS, 6, 3, generator=generator, dtype=torch.float64),
        torch.randn(4 * TASKS, 6, generator=generator, dtype=torch.float64),
    )

    def named(examples: list) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in examples]), "y": torch.stack([y for _, y in examples])}

    program = meta_program(fm.ITD(), parallel, init=False)
    own = fm.per_task({"w": torch.zeros(3, dtype=torch.float64)}, TASKS)
    meta = {"w": torch.ones(3, dtype=torch.float64), "decay": torch.zeros(3, dtype=torch.float64)}
    state = program.init({"own": own, "meta": meta})
    return program, state, {k: DataLoader(data, batch_size=TASKS, shuffle=True, collate_fn=named) for k in ("own", "meta")}


def main() -> None:
    """Train, and fail if it is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="data")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fail", choices=["kill", "raise", "nan", "drift"])
    asked = parser.parse_args()
    with fm.processes(timeout=60) as mine:
        make = learning if asked.kind == "tasks" else regression
        program, state, loaders = make(asked.kind if mine.size > 1 else None)
        fallen = Path() if asked.folder is None else asked.folder.with_suffix(".fallen")

        def check(state: fm.State) -> float:
            step = state.step[program.graph.tops[0]]
            if asked.fail and mine.rank == mine.size - 1 and step == 7 and not fallen.exists():
                fallen.touch()
                if asked.fail == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if asked.fail == "raise":
                    raise OSError("the disk with the validation data is gone")
            if asked.fail == "drift" and mine.rank == 1 and step == 7:
                state.params["w"].add_(1e-9)
            return float(step)

        how = {"steps": asked.steps, "checkpoint": asked.folder, "every": 2, "validate": check, "progress": False}
        state, history = program.run(state, loaders, **how)
        whole = program._plan.roles.gathered(state) if mine.size > 1 else state
        rows = history.drop(columns=[name for name in history if name.endswith(("seconds", "memory"))])
        figures = {name: [x.reshape(-1).tolist() for x in _tree.leaves(tree)] for name, tree in whole.params.items()}
        tell(mine, "trained", {"params": figures, "rows": json.loads(rows.to_json(double_precision=15))}, bits=whole.params)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
