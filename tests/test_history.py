"""The history of a run: rows in memory, on disk, as a frame and as a figure."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
import torchopt
from hypothesis import given

import funcmlo as fm
from funcmlo.train.history import History, HistoryFile
from funcmlo.train.rows import memory, numbers, row

values = st.floats(allow_nan=False)
rows = st.lists(st.dictionaries(st.sampled_from(["a/cost", "b/cost", "valid"]), values, min_size=1), max_size=12)


@given(rows)
def test_rows_come_back(given_rows: list[dict[str, float]]) -> None:
    history = History()
    for step, one in enumerate(given_rows, start=1):
        history.append(step, one)
    assert list(history.rows()) == list(enumerate(given_rows, start=1))
    frame = history.frame(stopped="steps")
    assert isinstance(frame, pd.DataFrame)
    assert isinstance(frame[:2], type(frame))
    assert list(frame.index) == list(range(1, len(given_rows) + 1))
    assert frame.attrs == {"stopped": "steps"}
    for name in frame:
        expected = [one.get(name, math.nan) for one in given_rows]
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(frame[name], expected, strict=True))


@given(rows, st.integers(0, 12), st.text(alphabet='{}":,0123ste', max_size=9))
def test_a_file_keeps_rows_up_to_a_step_and_forgets_a_torn_line(
    tmp_path_factory: pytest.TempPathFactory, given_rows: list[dict[str, float]], until: int, torn: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "history.jsonl"
    file = HistoryFile(path)
    for step, one in enumerate(given_rows, start=1):
        file.append(step, one)
    file.sync()
    file.close()
    with open(path, "a") as again:
        again.write('{"step": ' + torn)
    kept = [(step, one) for step, one in enumerate(given_rows, start=1) if step <= until]
    assert HistoryFile.read(path, until=until) == kept
    assert HistoryFile.read(path, until=99) == kept  # it was rewritten without the others
    file = HistoryFile(path)
    file.append(until + 1, {"x": math.inf, "y": -math.inf})
    file.close()
    assert HistoryFile.read(path, until=99)[-1] == (until + 1, {"x": math.inf, "y": -math.inf})


def test_a_value_takes_eight_bytes() -> None:
    history = History()
    for step in range(1000):
        history.append(step, {f"column {i}": 0.5 for i in range(20)})
    assert sum(sys.getsizeof(column) for column in history.columns.values()) < 1.3 * 8 * 20 * 1000


def test_a_row_has_what_step_tells() -> None:
    stats = {"y": fm.Stats(hvps=3, residual=torch.tensor(0.5), converged=torch.tensor(True))}
    metrics = {
        "y": {"cost": torch.tensor(2.0), "costs": torch.ones(3), "aux": {}, "gradient_norm": torch.tensor(4.0)},
        "x": {
            "cost": torch.tensor(1.0),
            "aux": {"accuracy": 0.5, "picture": torch.ones(2, 2), "name": "a", "one": torch.tensor([3])},
            "gradient_norm": torch.tensor(2.0),
            "stats": stats,
        },
    }
    found = row(metrics, {"y": 0.25})
    assert found["y/cost"] == 2.0
    assert found["y/gradient_norm"] == 4.0
    assert found["y/seconds"] == 0.25
    assert found["x/hypergradient_norm"] == 2.0
    assert "x/gradient_norm" not in found
    assert found["x/y/hvps"] == 3.0
    assert found["x/y/residual"] == 0.5
    assert found["x/y/converged"] == 1.0
    assert found["x/accuracy"] == 0.5
    assert found["x/one"] == 3.0
    assert "x/picture" not in found
    assert "x/name" not in found
    assert "x/y/iterations" not in found
    assert list(found)[:2] == ["y/cost", "y/gradient_norm"]


def test_numbers_of_tasks_are_their_mean() -> None:
    found = numbers({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([True, False]), "c": torch.zeros(0), "d": 1 + 2j})
    assert found == {"a": 2.0, "b": 0.5}
    assert memory(torch.device("cpu")) > 10 * 2**20


def ran(steps: int, **how: object) -> pd.DataFrame:
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum() + 0.1, torchopt.sgd(0.3), response=fm.AID(fm.CG(2))),
        fm.Level("x", lambda x, y: ((y - 1) ** 2).sum() + 1e-6, torchopt.sgd(0.3)),
    )
    state = program.init({"y": torch.zeros(2), "x": torch.zeros(2)})
    return program.run(state, {}, steps=steps, progress=False, **how)[1]


@pytest.mark.parametrize("steps", [0, 1, 60])
def test_the_figure_has_labelled_panels_that_need_no_colour(steps: int, tmp_path: Path) -> None:
    validate = {"valid": lambda s: {"a": s.params["x"][0], "b": s.params["y"][0]}, "test": lambda s: 1.0}
    history = ran(steps, validate=validate, validate_every={"test": 7, "valid": 1})
    drawn = history.figure()
    drawn.savefig(tmp_path / "figure.png")
    if not steps:
        assert drawn.axes[0].texts[0].get_text() == "no steps were made"
        return
    titles = [axis.get_title() for axis in drawn.axes]
    assert titles[:3] == ["cost", "gradient norm", "residual of the response"]
    assert {"valid"} < set(titles)
    assert ("test" in titles) == (steps >= 7)
    for axis in drawn.axes:
        assert axis.get_xlabel() == "outer step"
        lines = axis.get_lines()
        assert len({line.get_linestyle() for line in lines}) == len(lines)
        assert bool(axis.get_legend()) == (len(lines) > 1)
        assert len(lines) > 1 or axis.get_ylabel()
    if steps == 60:
        assert drawn.axes[0].get_yscale() == "log"
        assert drawn.axes[titles.index("valid")].get_yscale() == "linear"


def test_without_matplotlib_the_figure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    history = ran(1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(fm.DefinitionError, match=r"pip install 'funcmlo\[compare\]'"):
        history.figure()


def test_pandas_is_imported_when_a_run_is_asked_for() -> None:
    import subprocess

    code = "import funcmlo, sys; assert 'pandas' not in sys.modules and 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
