"""One script under torchrun and alone: the same numbers, and a run that goes on when a process dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from funcmlo import _tree
from tests.launch import launch
from tests.workers import training

SCRIPT = ("-m", "tests.workers.training")
# Sums over two processes in another order: rounding, times 36 updates of contractions.
ROUNDING = 1e-12


def alone(kind: str) -> tuple[dict[str, list[torch.Tensor]], dict[str, dict[str, float]]]:
    program, state, loaders = (training.learning if kind == "tasks" else training.regression)(None)
    top = program.graph.tops[0]
    state, history = program.run(state, loaders, steps=12, validate=lambda s: s.step[top], progress=False)
    rows = history.drop(columns=[name for name in history if name.endswith(("seconds", "memory"))])
    return {name: _tree.leaves(tree) for name, tree in state.params.items()}, json.loads(rows.to_json(double_precision=15))


@pytest.fixture(scope="module")
def unbroken() -> dict:
    return launch(*SCRIPT)[0]["trained"]


@pytest.mark.parametrize("kind", ["data", "tasks"])
def test_two_processes_train_as_one_does(kind: str, unbroken: dict) -> None:
    params, rows = alone(kind)
    found = unbroken if kind == "data" else launch(*SCRIPT, "--kind", kind)[0]["trained"]
    assert found["alike"]
    for name, leaves in params.items():
        for x, numbers in zip(leaves, found["params"][name], strict=True):
            torch.testing.assert_close(torch.tensor(numbers, dtype=x.dtype), x.reshape(-1), rtol=ROUNDING, atol=ROUNDING)
    shared = [name for name in found["rows"] if name in rows and "residual" not in name]
    assert {"valid"} < set(shared)
    assert len(shared) > 6
    for name in shared:
        assert found["rows"][name] == pytest.approx(rows[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("fail", ["kill", "raise"])
def test_a_run_goes_on_when_a_process_dies(fail: str, tmp_path: Path, unbroken: dict) -> None:
    arguments = ("--folder", str(tmp_path / "run"), "--fail", fail)
    told, output = launch(*SCRIPT, *arguments, options=("--max-restarts", "1"))
    assert (tmp_path / "run.fallen").exists()
    assert told["trained"] == unbroken, output[-3000:]


def test_a_process_that_dies_ends_the_others_with_one_clear_error(tmp_path: Path) -> None:
    told, output = launch(*SCRIPT, "--folder", str(tmp_path / "run"), "--fail", "kill", check=False)
    assert not told
    # What it hears first: that the other one is gone, or torchrun, which ends it.
    gone = "[process 0 of 2] ProcessError: process 0 of 2 cannot exchange numbers with the others" in output
    assert gone or "the run was told to end (SIGTERM) after 6 steps" in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir())[-1] >= "step-00000006"


def test_processes_that_drift_apart_are_told_and_nothing_is_saved(tmp_path: Path) -> None:
    _, output = launch(*SCRIPT, "--folder", str(tmp_path / "run"), "--fail", "drift", check=False)
    assert "ProcessError: level 'w': the processes no longer hold the same numbers, so nothing was saved" in output
    assert max(path.name for path in (tmp_path / "run").iterdir() if path.is_dir()) == "step-00000006"
