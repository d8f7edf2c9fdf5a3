"""Callbacks: early stopping, the bar, and the loggers, by the real packages where they are installed."""

from __future__ import annotations

import csv
import io
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo.train.callbacks import Start, as_callback
from funcmlo.train.history import History
from funcmlo.train.progress import Progress


def run(steps: int, *callbacks: Any, folder: Path | None = None, fail: int | None = None) -> Any:
    """A small program; its loss raises at a step."""

    def loss(y: torch.Tensor, batch: int) -> tuple[torch.Tensor, dict]:
        if batch == fail:
            raise ValueError("the loss is lost")
        return (y**2).sum(), {"late": 1.0} if batch >= 2 else {}

    program = fm.Multilevel(fm.Level("y", loss, torchopt.sgd(0.25)))
    state = program.init({"y": torch.ones(1)})
    return program.run(state, {"y": lambda t: t}, steps=steps, callbacks=callbacks, checkpoint=folder, progress=False)


def start(**how: Any) -> Start:
    return Start(**{"program": "p", "levels": ("y",), "steps": 9, "begun": 0, "seed": 0, "history": History(), **how})


def stopped(values: list[float], **how: Any) -> int | None:
    stopping = fm.EarlyStopping("valid", **how)
    stopping.begin(start())
    return next((i for i, v in enumerate(values) if stopping.record(i, {"valid": v}, None)), None)


@pytest.mark.parametrize(
    ("values", "how", "expected"),
    [
        ([3, 2, 2, 2, 1], {"patience": 3}, None),
        ([3, 2, 2, 2, 2], {"patience": 3}, 4),
        ([1, 2, 3, 3, 3], {"patience": 2, "mode": "max"}, 4),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "min_delta": 0.2}, 2),
        ([math.nan, math.nan, 1], {"patience": 2}, 1),
        ([1, math.nan, math.nan], {"patience": 2}, 2),
    ],
)
def test_early_stopping_counts_rows_without_a_better_value(values: list[float], how: dict, expected: int | None) -> None:
    assert stopped(values, **how) == expected


def test_early_stopping_looks_at_rows_that_have_its_column_and_begins_anew() -> None:
    stopping = fm.EarlyStopping("valid", patience=1)
    for _ in range(2):
        stopping.begin(start())
        assert not stopping.record(1, {"valid": 1.0}, None)
        assert not stopping.record(2, {"cost": 1.0}, None)
        assert stopping.record(3, {"valid": 1.0}, None)


def test_a_column_that_never_is_is_told() -> None:
    with pytest.warns(fm.FuncmloWarning, match=r"no row of the history has 'y/costs'; did you mean 'y/cost'\? There are"):
        run(2, fm.EarlyStopping("y/costs"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metric": 3}, "expected a column's name"),
        ({"patience": 0}, "expected an integer of at least 1"),
        ({"mode": "less"}, "expected 'min' or 'max'"),
        ({"min_delta": -1.0}, "expected a number of at least 0"),
    ],
)
def test_wrong_settings_of_early_stopping(how: dict, message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        fm.EarlyStopping(**{"metric": "valid", **how})


def test_functions_and_foreign_objects_are_callbacks() -> None:
    class Foreign:
        def begin(self, start: Start) -> None: ...
        def record(self, step: int, row: dict, state: Any) -> bool:
            return step == 2

        def end(self, state: Any, error: Any) -> None: ...

    assert len(run(5, Foreign())[1]) == 2
    assert len(run(5, lambda step, row, state: step == 3)[1]) == 3
    assert len(run(5, lambda step, row, state: step)[1]) == 5  # only True ends a run
    with pytest.raises(fm.DefinitionError, match=r"object came; expected objects with the methods begin, record and end"):
        as_callback(object())


def test_csv_has_a_line_for_each_step_and_goes_on_where_the_run_does(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.csv"
    run(5, fm.CSVLogger(path), folder=tmp_path / "run")
    with open(path, "a") as file:
        file.write("6,1.0\n7,1.")  # of a run that was killed after its last checkpoint
    run(8, fm.CSVLogger(path), folder=tmp_path / "run")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(t) for t in range(1, 9)]
    assert [row["y/late"] for row in rows] == ["", "", *["1.0"] * 6]
    assert [float(row["y/cost"]) for row in rows] == [0.25**t for t in range(8)]
    run(4, fm.CSVLogger(path, every=2))
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "2", "4"]
    assert not list(path.parent.glob(".*"))


def test_a_csv_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fm.DefinitionError, match="the file cannot be written"):
        run(2, fm.CSVLogger(tmp_path / "file" / "log.csv"))


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(3, fm.TensorBoardLogger(tmp_path / "tb"), folder=tmp_path / "run")
    run(5, fm.TensorBoardLogger(tmp_path / "tb"), folder=tmp_path / "run")
    found = accumulators.EventAccumulator(str(tmp_path / "tb"))
    found.Reload()
    events = found.Scalars("y/cost")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert [event.value for event in events] == [0.25**t for t in range(5)]


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    logger = fm.WandbLogger("project", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    run(2, logger)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    with pytest.raises(ValueError, match="the loss is lost"):
        run(5, fm.MLflowLogger(tmp_path / "runs", "mine", run_name="one"), fail=3)
    client = MlflowClient(tracking_uri=(tmp_path / "runs").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FAILED"
    assert "the loss is lost" in found.data.tags["error"]
    assert found.data.params["seed"] == "0"
    assert "Level" in found.data.params["level y"]
    history = client.get_metric_history(found.info.run_id, "y/cost")
    assert [(m.step, m.value) for m in history] == [(t + 1, 0.25**t) for t in range(3)]


class Recorder(types.ModuleType):
    """Stands in for a package: notes what is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        """Note a call."""
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **how: Any) -> Any:
            self.calls.append((name, args, how))
            return self

        return call


def test_wandb_hears_of_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Recorder("wandb")
    stand_in.summary = {}
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(ValueError, match="the loss is lost"):
        run(5, fm.WandbLogger("project", every=2, id="abc"), fail=3)
    names = [name for name, _, _ in stand_in.calls]
    assert names == ["init", "log", "finish"]
    assert stand_in.calls[0][2]["mode"] == "offline"
    assert stand_in.calls[0][2]["resume"] == "allow"
    assert stand_in.calls[1][2] == {"step": 2}
    assert stand_in.calls[1][1][0]["y/cost"] == 0.25
    assert stand_in.calls[2][2] == {"exit_code": 1}
    assert "the loss is lost" in stand_in.summary["error"]


@pytest.mark.parametrize(
    ("make", "package"),
    [
        (lambda: fm.TensorBoardLogger("x"), "tensorboard"),
        (lambda: fm.WandbLogger("x"), "wandb"),
        (lambda: fm.MLflowLogger("x"), "mlflow-skinny"),
    ],
)
def test_an_absent_package_is_told_at_once(make: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(fm.DefinitionError, match=f"which is not installed: pip install {package}"):
        make()


def test_the_bar_tells_costs_and_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = Progress(("x",))
    bar.begin(start(levels=("y", "x"), steps=4, begun=1))
    bar._bar.mininterval = bar._bar.miniters = 0
    for step in (2, 3, 4):
        bar.record(step, {"x/cost": 0.1234567, "y/cost": 9.0, "seconds": 1.0, "valid/accuracy": 0.5}, None)
    bar.end(None, None)
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "x=0.123" in shown
    assert "valid/accuracy=0.5" in shown
    assert " y=" not in shown
    assert "seconds=" not in shown
