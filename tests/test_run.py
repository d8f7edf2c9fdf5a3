"""`run`: loaders, resuming, policies, and what becomes of a run that fails."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torchopt
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import funcmlo as fm
from funcmlo.train.checkpoint import newest
from tests.launch import ROOT
from tests.workers.tell import MARK, digest

POINTS = TensorDataset(torch.arange(12, dtype=torch.float64))


def begin(**how: Any) -> tuple[fm.Multilevel, fm.State, dict[str, Any]]:
    """A mean with a learned penalty, Adam everywhere, and shuffled loaders."""

    def train(mean: torch.Tensor, decay: torch.Tensor, batch: list) -> torch.Tensor:
        return ((mean - batch[0]) ** 2).mean() / 2 + decay.exp() * mean**2

    def valid(decay: torch.Tensor, mean: torch.Tensor, batch: list) -> tuple[torch.Tensor, dict]:
        return ((mean - batch[0]) ** 2).mean() + 0.01 * decay**2, {
            "mean": mean.detach(),
            "note": "text",
            "size": len(batch[0]),
        }

    response = fm.AID(fm.CG(3), warm_start=True)
    program = fm.Multilevel(
        fm.Level("mean", train, torchopt.adam(0.1), steps=3, response=response, **how),
        fm.Level("decay", valid, torchopt.adam(0.1)),
    )
    zero = torch.zeros((), dtype=torch.float64)
    loaders = {
        "mean": DataLoader(POINTS, batch_size=5, shuffle=True),
        "decay": DataLoader(POINTS, batch_size=4, shuffle=True),
    }
    return program, program.init({"mean": zero, "decay": zero}), loaders


def run(steps: int = 20, **how: Any) -> tuple[fm.State, Any]:
    program, state, loaders = begin()
    return program.run(state, loaders, steps=steps, **{"progress": False, **how})


def bits(state: fm.State) -> str:
    return digest([state.params, state.optimizer, state.response]) + str(state.step)


def test_a_run_is_its_steps_and_the_history_a_frame() -> None:
    program, state, loaders = begin()
    final, history = program.run(
        state, loaders, steps=6, validate=lambda s: s.params["mean"], validate_every=2, progress=False
    )
    assert isinstance(history, pd.DataFrame)
    assert list(history.index) == [1, 2, 3, 4, 5, 6]
    assert history.index.name == "step"
    assert {"mean/cost", "mean/gradient_norm", "mean/seconds", "decay/hypergradient_norm", "decay/mean/hvps"} < set(history)
    assert {"decay/mean/residual", "decay/mean", "decay/size", "seconds", "memory", "valid"} < set(history)
    assert "decay/note" not in history
    assert list(history["valid"].dropna().index) == [2, 4, 6]
    assert float(history["valid"][6]) == float(final.params["mean"])
    assert history.attrs["stopped"] == "steps"
    assert (history["mean/seconds"] + history["decay/seconds"] <= history["seconds"]).all()
    # The same batches given to `step` by hand.
    mean = _drawn(loaders["mean"], state, 18)
    decay = _drawn(loaders["decay"], state, 6, "decay")
    for t in range(6):
        state, metrics = program.step(state, {"mean": iter(mean[3 * t : 3 * t + 3]), "decay": decay[t]})
        assert float(metrics["decay"]["cost"]) == history["decay/cost"][t + 1]
        assert float(metrics["mean"]["gradient_norm"]) == history["mean/gradient_norm"][t + 1]
    assert bits(state) == bits(final)


def _drawn(loader: Any, state: fm.State, n: int, level: str = "mean") -> list[Any]:
    from funcmlo.train.sources import source

    stream = source(level, loader, seed=state.seed, device=torch.device("cpu"))
    return [next(stream) for _ in range(n)]


def test_a_run_in_pieces_is_one_run(tmp_path: Path) -> None:
    whole, history = run()
    for steps in (3, 10, 10, 20):
        part, rows = run(steps, checkpoint=tmp_path, every=4)
    assert bits(part) == bits(whole)
    drop = [name for name in history if name.endswith(("seconds", "memory"))]
    pd.testing.assert_frame_equal(pd.DataFrame(rows.drop(columns=drop)), pd.DataFrame(history.drop(columns=drop)))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000012", "step-00000016", "step-00000020"]
    # Without a checkpoint a second run goes on in the data too, by the state's step counters.
    program, state, loaders = begin()
    state, _ = program.run(state, loaders, steps=12, progress=False)
    state, _ = program.run(state, loaders, steps=8, progress=False)
    assert bits(state) == bits(whole)


def test_kills_at_random_moments_lose_nothing() -> None:
    """20 steps = any number of runs, each killed, with Adam, dropout, BatchNorm, shuffled random data and warm starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.workers.killed", "0"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith(MARK))
    assert '"kills": 50, "wrong": []' in told
    assert '"finished": 0' not in told
    assert '"writing": 0' not in told


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    program, state, loaders = begin()
    final, _ = program.run(state, loaders, steps=4, accumulate={"mean": 2}, progress=False, checkpoint=tmp_path, every=3)
    again, _ = program.run(state, loaders, steps=4, accumulate={"mean": 2}, progress=False)
    drawn, decay = _drawn(loaders["mean"], state, 24), _drawn(loaders["decay"], state, 4, "decay")
    for t in range(4):
        parts = [fm.Microbatches(drawn[6 * t + 2 * i : 6 * t + 2 * i + 2]) for i in range(3)]
        state, _ = program.step(state, {"mean": iter(parts), "decay": decay[t]})
    assert bits(state) == bits(final) == bits(again)
    by_hand = [torch.cat([part[0] for part in drawn[:2]])]
    program, state, _ = begin()
    one = program.step(state, {"mean": iter([by_hand] * 3), "decay": decay[0]})[0]
    two = program.step(state, {"mean": iter([fm.Microbatches(drawn[:2])] * 3), "decay": decay[0]})[0]
    torch.testing.assert_close(two.params["mean"], one.params["mean"], rtol=1e-13, atol=0)


def test_an_interrupt_hands_back_the_state_reached(tmp_path: Path) -> None:
    def stop(step: int, row: object, state: fm.State) -> None:
        if step == 5:
            raise KeyboardInterrupt

    state, history = run(callbacks=[stop], checkpoint=tmp_path)
    assert history.attrs["stopped"] == "interrupted"
    assert bits(state) == bits(run(5)[0])
    assert len(history) == 5
    assert bits(run(checkpoint=tmp_path)[0]) == bits(run()[0])


def test_sigterm_saves_and_ends(tmp_path: Path) -> None:
    script = f"""
import os, signal, torch, torchopt, funcmlo as fm
program = fm.Multilevel(fm.Level("y", lambda y: (y**2).sum(), torchopt.sgd(0.25)))
kill = lambda step, row, state: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None
state = program.init({{"y": torch.ones(())}})
program.run(state, {{}}, steps=99, progress=False, checkpoint={str(tmp_path)!r}, callbacks=[kill])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "the run was told to end (SIGTERM) after 7 steps" in done.stderr
    assert newest(tmp_path).name == "step-00000007"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_early_stopping_ends_a_run_where_it_would_end_in_one_go(tmp_path: Path) -> None:
    def validate(state: fm.State) -> float:
        return abs(state.step["decay"] - 6.0)

    how = {"validate": validate, "callbacks": [fm.EarlyStopping("valid", patience=3)]}
    state, history = run(**how)
    assert len(history) == 9
    assert "early stopping" in history.attrs["stopped"]
    run(8, checkpoint=tmp_path, **how)
    again, rows = run(checkpoint=tmp_path, **how)
    assert len(rows) == 9
    assert bits(again) == bits(state)


class Poisoned:
    """Batches of which some are NaN."""

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __call__(self, t: int) -> list[torch.Tensor]:
        return [torch.full((4,), math.nan if t in self.bad else 1.0 + t % 3, dtype=torch.float64)]


def test_what_is_not_finite_ends_the_run_or_is_passed_over(tmp_path: Path) -> None:
    program, state, loaders = begin()
    data = {"mean": Poisoned(4), "decay": loaders["decay"]}
    with pytest.raises(fm.NonFiniteError, match=r"level 'mean': its cost is nan at inner step 2 of 3") as raised:
        program.run(state, data, steps=6, progress=False, checkpoint=tmp_path)
    good, _ = program.run(state, data, steps=1, progress=False)
    assert bits(raised.value.state) == bits(good)
    assert len(raised.value.history) == 1
    assert newest(tmp_path).name == "step-00000001"

    final, history = program.run(state, data, steps=6, progress=False, on_nonfinite="skip")
    assert list(history["skipped"].dropna().index) == [2]
    assert final.step == {"mean": 18, "decay": 6}
    assert torch.isfinite(final.params["mean"])
    # By hand: the second step's batches are passed over, and nothing else.
    decay = _drawn(loaders["decay"], state, 6, "decay")
    for t in range(6):
        if t == 1:
            state = program._plan.passed_over(state)
        else:
            state, _ = program.step(state, {"mean": data["mean"], "decay": decay[t]})
    assert bits(state) == bits(final)
    with pytest.raises(fm.NonFiniteError):  # nothing but NaN is not passed over for ever
        program.run(state, {**data, "mean": Poisoned(*range(1000))}, steps=100, progress=False, on_nonfinite="skip")


class Broken(IterableDataset):
    """A stream that fails."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Give seven."""
        yield from torch.ones(7, dtype=torch.float64)
        raise OSError("the archive is torn")


def test_a_loader_that_raises_ends_the_run_with_one_clear_error(tmp_path: Path) -> None:
    program, state, loaders = begin()
    data = {**loaders, "mean": DataLoader(Broken(), batch_size=None, collate_fn=lambda x: [x.reshape(1)])}
    with pytest.raises(fm.BatchError, match=r"batch 8 of level 'mean'.*OSError: the archive is torn") as raised:
        program.run(state, data, steps=6, progress=False, checkpoint=tmp_path)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.state.step == {"mean": 6, "decay": 2}
    assert len(raised.value.history) == 2
    assert newest(tmp_path).name == "step-00000002"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_too_little_memory_is_one_clear_error(error: Exception) -> None:
    def loss(y: torch.Tensor, batch: int) -> torch.Tensor:
        if batch == 3:
            raise error
        return (y**2).sum()

    program = fm.Multilevel(fm.Level("y", loss, torchopt.sgd(0.1)))
    with pytest.raises(
        fm.OutOfMemoryError, match=r"step 4 ran out of memory.*smaller batches or run\(accumulate="
    ) as raised:
        program.run(program.init({"y": torch.ones(())}), {"y": lambda t: t}, steps=9, progress=False)
    assert isinstance(raised.value, MemoryError)
    assert raised.value.state.step == {"y": 3}


def test_real_exhaustion_is_told_too() -> None:
    def loss(y: torch.Tensor) -> torch.Tensor:
        return (y * torch.ones(2**46).sum()).sum()

    program = fm.Multilevel(fm.Level("y", loss, torchopt.sgd(0.1)))
    with pytest.raises(fm.OutOfMemoryError, match="ran out of memory"):
        program.run(program.init({"y": torch.ones(())}), {}, steps=2, progress=False)


def test_a_full_disk_ends_the_run_and_what_was_saved_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, state, loaders = begin()
    program.run(state, loaders, steps=2, progress=False, checkpoint=tmp_path)
    sync = os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(fm.CheckpointError, match="No space left on device") as raised:
        program.run(state, loaders, steps=8, progress=False, checkpoint=tmp_path, every=3)
    assert raised.value.state.step["decay"] == 3
    monkeypatch.setattr(os, "fsync", sync)
    assert newest(tmp_path).name == "step-00000002"
    final, _ = program.run(state, loaders, steps=8, progress=False, checkpoint=tmp_path)
    assert bits(final) == bits(run(8)[0])


def test_a_damaged_or_foreign_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    run(4, checkpoint=tmp_path, every=2)
    file = tmp_path / "step-00000004" / "state.pt"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(fm.CheckpointError, match=r"step-00000004 is damaged.*step-00000002, is good: remove"):
        run(checkpoint=tmp_path)
    program, state, loaders = begin()
    other = program.init(state.params, seed=5)
    program.run(other, loaders, steps=2, checkpoint=tmp_path / "new", progress=False)
    with pytest.raises(fm.CheckpointError, match="seed"):
        program.run(state, loaders, steps=9, checkpoint=tmp_path / "new", progress=False)


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fm.CheckpointError):
        run(checkpoint=tmp_path / "file")
    with pytest.raises(fm.CheckpointError):
        run(checkpoint=tmp_path / "file" / "inside")


def test_callbacks_hear_of_everything_and_are_ended_once() -> None:
    heard: list[Any] = []

    class Ear(fm.Callback):
        def begin(self, start: Any) -> None:
            heard.append(("begin", start.steps, start.begun, start.levels))

        def record(self, step: int, row: Any, state: fm.State) -> bool | None:
            heard.append(("record", step, "mean/cost" in row))
            return step == 3 or None

        def end(self, state: fm.State, error: BaseException | None) -> None:
            heard.append(("end", state.step["decay"], error))

    _, history = run(callbacks=[Ear()])
    assert heard == [("begin", 20, 0, ("mean", "decay")), *[("record", t, True) for t in (1, 2, 3)], ("end", 3, None)]
    assert "Ear" in history.attrs["stopped"]
    heard.clear()

    def fail(step: int, row: object, state: fm.State) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as raised:
        run(callbacks=[Ear(), fail])
    assert heard[-1] == ("end", 1, raised.value)
    assert raised.value.state.step["decay"] == 1


def test_devices_and_trees_of_batches() -> None:
    """Batches of any tree reach the loss; a fixed one and a function need no loader."""
    seen: list[type] = []

    def loss(y: torch.Tensor, batch: dict) -> torch.Tensor:
        seen.append(type(batch["pair"]))
        return ((y - batch["pair"][0]) ** 2).mean()

    program = fm.Multilevel(fm.Level("y", loss, torchopt.sgd(0.1)))
    state = program.init({"y": torch.zeros(())})
    given = {"pair": (torch.ones(3), "name")}
    one, _ = program.run(state, {"y": given}, steps=2, progress=False)
    two, _ = program.run(state, {"y": lambda t: given}, steps=2, progress=False)
    assert torch.equal(one.params["y"], two.params["y"])
    assert set(seen) == {tuple}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"steps": -1}, r"run\(steps=-1\): expected an integer of at least 0"),
        ({"steps": 2.5}, r"run\(steps=2.5\)"),
        ({"every": 0}, r"run\(every=0\): expected an integer of at least 1"),
        ({"keep": True}, r"run\(keep=True\)"),
        ({"checkpoint": 3}, r"run\(checkpoint=3\): expected a folder's name"),
        ({"on_nonfinite": "ignore"}, r"on_nonfinite='ignore'\): expected 'raise' or 'skip'"),
        ({"validate": 3}, r"run\(validate=3\): expected a function of the state"),
        ({"validate_every": {"vaild": 2}, "validate": abs}, r"names 'vaild'; did you mean 'valid'\?"),
        ({"accumulate": {"meen": 2}}, r"names 'meen'; did you mean 'mean'\?"),
        ({"accumulate": 0}, r"run\(accumulate=0\)"),
        ({"callbacks": [fm.CSVLogger]}, r"the class CSVLogger came; expected an object of it"),
        ({"callbacks": [3]}, r"callbacks: int came"),
    ],
)
def test_wrong_settings_are_told(how: dict[str, Any], message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        run(**{"steps": 1, **how})


def test_wrong_data_are_told() -> None:
    program, state, loaders = begin()
    with pytest.raises(fm.BatchError, match=r"data names 'meen', which is no level; did you mean 'mean'\?"):
        program.run(state, {"meen": loaders["mean"]}, steps=1)
    with pytest.raises(fm.BatchError, match="data came as list"):
        program.run(state, [loaders], steps=1)
    with pytest.raises(fm.BatchError, match=r"accumulate=\{'mean': 2\}\): the data of level 'mean' are one fixed batch"):
        program.run(state, {**loaders, "mean": [torch.ones(2)]}, steps=1, accumulate=2, progress=False)
    with pytest.raises(fm.LossError, match=r"run\(validate=…\): valid is str"):
        program.run(state, loaders, steps=1, validate=lambda s: "good", progress=False)
