"""Sweeps: the same bits however many cells run at a time, finished cells outlive a kill, one failure stops no other cell."""

from __future__ import annotations

import doctest
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from funcmlo.errors import DefinitionError
from paper_repro import experiment
from paper_repro import sweep as sweeping
from paper_repro.cells import Cells, plain, written
from paper_repro.cli import main
from paper_repro.sweep import SweepError, grid, share, sweep

ROOT = Path(__file__).parents[2]
CALLS: list[dict[str, Any]] = []
SMALL = ["run", "hypercleaning", "--preset", "smoke", "--methods", "cg", "itd"]


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def noisy(seed: int, size: int = 50) -> dict[str, Any]:
    """Something whose bits depend on threads, on the state of every generator, and on the cell."""
    CALLS.append({"seed": seed, "size": size})
    x = torch.randn(size, size)
    return {
        "sum": float((x @ x).sum()),
        "numpy": float(numpy.random.randn()),
        "python": random.random(),
        "threads": torch.get_num_threads(),
        "tensor": x[0],
        "pair": (1, None),
    }


def troubled(seed: int) -> int:
    if seed == 1:
        raise ValueError("seed 1 is bad")
    if seed == 2:
        sys.exit(3)
    return 10 * seed


def deadly(seed: int) -> int:
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 * seed


def where(seed: int) -> int:
    return os.getpid()


def same(a: Any, b: Any) -> bool:
    """Compare to the bit, types included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_a_grid_is_in_order() -> None:
    assert grid(a=[1, 2], b="xy") == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]
    assert grid(a=[]) == []


@pytest.mark.parametrize("module", [sweeping, experiment])
def test_the_examples_run(module: Any) -> None:
    # The test command collects the doctests of funcmlo alone.
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_many_jobs_give_the_bits_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = grid(seed=range(4), size=[30, 50])
    one = sweep(noisy, cells, threads=2, tell=None)
    two = sweep(noisy, cells, threads=2, jobs=2, out=tmp_path)
    again = sweep(noisy, cells, threads=2, jobs=2, out=tmp_path)
    assert same(one, two)
    assert same(one, again)
    assert {result["threads"] for result in one} == {2}
    assert one[0]["sum"] != one[2]["sum"]
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines[:8]] == [f"[{i}/8" for i in range(1, 9)]
    assert {line.split("] ")[1] for line in lines[:8]} == {f"seed={s}, size={n}" for s in range(4) for n in (30, 50)}
    assert lines[8:] == [f"8 of 8 cells are in {tmp_path / 'cells'} already"]


def test_a_cell_does_not_depend_on_what_ran_before_and_leaves_no_trace() -> None:
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    expected = float(torch.rand(())), random.random(), float(numpy.random.rand())
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    both = sweep(noisy, grid(seed=[0, 1]), threads=2, tell=None)
    assert (float(torch.rand(())), random.random(), float(numpy.random.rand())) == expected
    assert torch.get_num_threads() == 1
    (alone,) = sweep(noisy, grid(seed=[1]), threads=2, tell=None)
    assert same(alone, both[1])


def test_threads_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [share(jobs) for jobs in (1, 2, 3, 8, 100)] == [8, 4, 2, 1, 1]
    monkeypatch.undo()
    found = sweep(noisy, grid(seed=[1, 2]), threads=lambda cell: cell["seed"], tell=None)
    assert [one["threads"] for one in found] == [1, 2]


def test_finished_cells_are_found_again_and_others_run(tmp_path: Path) -> None:
    first = sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=None)
    assert len(CALLS) == 2
    said: list[str] = []
    more = sweep(noisy, grid(seed=[2, 1, 0, 2]), out=tmp_path, tell=said.append)
    assert [call["seed"] for call in CALLS] == [0, 1, 2]
    assert same([more[2], more[1]], first)
    assert same(more[0], more[3])
    assert said == [f"2 of 3 cells are in {tmp_path / 'cells'} already", "[3/3] seed=2"]


def test_fresh_begins_anew_and_leaves_other_sweeps_alone(tmp_path: Path) -> None:
    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=None)
    sweep(noisy, grid(seed=[1]), out=tmp_path, fresh=True, tell=None)
    assert [call["seed"] for call in CALLS] == [0, 1, 1]
    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=None)
    assert len(CALLS) == 3


def test_fresh_forgets_before_it_runs(tmp_path: Path) -> None:
    """Otherwise a kill would leave a mixture of old and new results."""
    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=None)
    seen = []

    def stop(text: str) -> None:
        seen.append(len(list((tmp_path / "cells").glob("*.cell"))))

    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, fresh=True, tell=stop)
    assert seen == [1, 2]


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"threads": 3}, {"cells": [{"seed": 0, "size": 51}]}, {"cells": [{"seed": 0.0}]}],
    ids=["version", "threads", "value", "type"],
)
def test_the_key_has_all_that_a_result_depends_on(tmp_path: Path, change: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"cells": [{"seed": 0}], "threads": 1, "version": 1, "out": tmp_path, "tell": None}
    sweep(noisy, **usual)
    sweep(noisy, **usual)
    assert len(CALLS) == 1
    sweep(noisy, **(usual | change))
    assert len(CALLS) == 2


def test_functions_are_told_apart(tmp_path: Path) -> None:
    for function in (noisy, partial(noisy, size=20), partial(noisy, size=30), partial(noisy, size=20)):
        sweep(function, [{"seed": 0}], out=tmp_path, tell=None)
    assert [call["size"] for call in CALLS] == [50, 20, 30]
    with pytest.raises(DefinitionError, match="expected a function with a name"):
        sweep(lambda seed: seed, [{"seed": 0}], out=tmp_path, tell=None)
    assert sweep(lambda seed: seed, [{"seed": 7}], tell=None) == [7]


@dataclass(frozen=True)
class Rate:
    value: float


def test_cells_are_named_by_plain_values_and_dataclasses() -> None:
    assert written({"b": Rate(0.1), "a": (1, None)}) == written({"a": [1, None], "b": Rate(0.1)})
    assert len({written(v) for v in (1, 1.0, True, "1", Rate(1.0), Rate(1), None, torch.float32)}) == 8
    with pytest.raises(DefinitionError, match=r"of type function; expected numbers, texts"):
        sweep(noisy, [{"seed": noisy}])
    with pytest.raises(DefinitionError, match=r"of type Tensor"):
        written({"x": torch.zeros(1000)})  # its repr has a few of the numbers only


def test_results_are_plain_and_the_same_from_a_file(tmp_path: Path) -> None:
    result = {
        "a": [1, (2.5, "x", None)], "b": torch.arange(3.0)[1:], 3: True, "nan": math.nan, "inf": -math.inf, "tiny": 5e-324,
        "empty": {}, "bf16": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    cells = Cells(tmp_path)
    key = written({"cell": {"a": 1}})
    cells.write(key, plain(result))
    assert same(cells.read(key), result)
    assert type(plain(numpy.float64(0.1))) is float
    weight = torch.nn.Parameter(torch.ones(2))
    assert type(plain(weight)) is torch.Tensor
    for wrong in (numpy.float32(1), numpy.ones(2), Rate(1.0), {1, 2}, [object()]):
        with pytest.raises(TypeError, match="expected numbers, texts, None, tensors"):
            plain(wrong)


@pytest.mark.parametrize("damage", ["cut", "altered", "another's", "empty"])
def test_a_damaged_file_is_told_and_the_cell_runs_again(tmp_path: Path, damage: str) -> None:
    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=None)
    first, other = sorted((tmp_path / "cells").glob("*.cell"))
    content = first.read_bytes()
    damaged = {
        "cut": content[:-1],
        "altered": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        "another's": other.read_bytes(),
        "empty": b"",
    }
    first.write_bytes(damaged[damage])
    said: list[str] = []
    sweep(noisy, grid(seed=[0, 1]), out=tmp_path, tell=said.append)
    assert len(CALLS) == 3
    assert said[0] == f"{first} is cut short or altered; the cell runs again"
    assert first.read_bytes().split(b"\n")[0] == content.split(b"\n")[0]


def test_a_hostile_file_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    cells = Cells(tmp_path)
    key = written({"cell": {"a": 1}})
    cells.write(key, Hostile())
    with pytest.raises(Exception, match="Weights only load failed"):
        cells.read(key)
    assert not (tmp_path / "run").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells, key = Cells(tmp_path), written({"cell": {"a": 1}})
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(Path, "replace", lambda self, target: order.append("rename") or replace(self, target))
    cells.write(key, 1)
    assert order == ["fsync", "rename", "fsync"]  # the file, its name, the folder

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cells.write(key, 2)
    assert cells.read(key) == 1
    assert list(tmp_path.iterdir()) == [cells.path(key)]


def test_half_a_temporary_file_is_no_cell(tmp_path: Path) -> None:
    sweep(noisy, grid(seed=[0]), out=tmp_path, tell=None)
    (path,) = (tmp_path / "cells").iterdir()
    path.rename(path.with_suffix(".tmp"))
    sweep(noisy, grid(seed=[0]), out=tmp_path, tell=None)
    assert len(CALLS) == 2
    assert list((tmp_path / "cells").iterdir()) == [path]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_stops_no_other_cell(tmp_path: Path, jobs: int) -> None:
    said: list[str] = []
    with pytest.raises(SweepError, match=r"(?s)2 of 5 cells failed:.*seed=1: ValueError: seed 1 is bad") as caught:
        sweep(troubled, grid(seed=range(5)), jobs=jobs, out=tmp_path, tell=said.append)
    assert caught.value.results == [0, None, None, 30, 40]
    failures = {failure.cell["seed"]: failure for failure in caught.value.failures}
    assert {seed: failure.type for seed, failure in failures.items()} == {1: "ValueError", 2: "SystemExit"}
    assert 'raise ValueError("seed 1 is bad")' in failures[1].traceback
    assert any(re.fullmatch(r"\[\d/5\] seed=1: failed, ValueError: seed 1 is bad", line) for line in said)
    assert len(list((tmp_path / "cells").glob("*.cell"))) == 3
    said.clear()
    with pytest.raises(SweepError, match="2 of 5 cells failed"):
        sweep(troubled, grid(seed=range(5)), jobs=jobs, out=tmp_path, tell=said.append)
    assert said[0].startswith("3 of 5 cells")


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_cell_with_it(tmp_path: Path) -> None:
    with pytest.raises(
        SweepError, match=r"1 of 5 cells failed:\n  seed=1: TerminatedWorkerError: its process died"
    ) as caught:
        sweep(deadly, grid(seed=range(5)), jobs=2, out=tmp_path, tell=None)
    assert caught.value.results == [0, None, 20, 30, 40]


def test_a_result_that_is_not_plain_is_the_cells_failure() -> None:
    with pytest.raises(SweepError, match="seed=0: TypeError: a cell returned a Rate; expected numbers"):
        sweep(lambda seed: Rate(1.0), grid(seed=[0]), tell=None)


def test_wrong_use_is_told(tmp_path: Path) -> None:
    for wrong in ({"jobs": 0}, {"jobs": 1.5}, {"backend": "spark"}, {"backend": "dask", "jobs": 2}):
        with pytest.raises(DefinitionError, match=r"expected jobs of at least 1"):
            sweep(noisy, [], **wrong)
    with pytest.raises(DefinitionError, match="threads=0 came"):
        sweep(noisy, [{"seed": 0}], threads=0)
    (tmp_path / "cells").write_text("a file")
    with pytest.raises(OSError, match="cells"):
        sweep(noisy, [{"seed": 0}], out=tmp_path)
    assert sweep(noisy, []) == []
    assert CALLS == []


def test_an_interruption_leaves_finished_cells(tmp_path: Path) -> None:
    def stop(text: str) -> None:
        if text.startswith("[2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(noisy, grid(seed=range(4)), out=tmp_path, tell=stop)
    assert len(list((tmp_path / "cells").glob("*.cell"))) == 2


# The command line.


def outcomes(folder: Path) -> Any:
    """What was recorded, but for wall seconds."""
    content = json.loads((folder / "results.json").read_text())
    return [{k: v for k, v in outcome.items() if k != "seconds"} for outcome in content["outcomes"]]


@pytest.mark.slow
def test_jobs_change_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for jobs in ("1", "2"):
        assert main([*SMALL, "--jobs", jobs, "--out", str(tmp_path / jobs)]) == 0
    assert outcomes(tmp_path / "1") == outcomes(tmp_path / "2")
    assert len(list((tmp_path / "2" / "cells").iterdir())) == 3  # the baselines are one cell
    capsys.readouterr()
    # What one job has kept, two need not run.
    assert main([*SMALL, "--seeds", "2", "--jobs", "2", "--out", str(tmp_path / "1")]) == 0
    printed = capsys.readouterr().out
    assert "3 of 6 cells are in" in printed
    assert re.search(r"^\[6/6\] seed 1  \w+: test accuracy 0\.\d+", printed, re.MULTILINE)
    table = (tmp_path / "1" / "table.txt").read_text()
    assert main([*SMALL, "--seeds", "2", "--out", str(tmp_path / "1")]) == 0
    assert (tmp_path / "1" / "table.txt").read_text() == table


def test_values_are_of_the_settings_type() -> None:
    from paper_repro.hypercleaning.run import PRESETS

    settings = PRESETS["smoke"]["digits"]
    found = experiment.varied(settings, {"decay": ["1", "0.5"], "threads": ["2"]})
    assert [repr(one.decay) for one in found.values()] == ["1.0", "0.5"]
    assert list(found) == ["decay=1.0", "decay=0.5"]
    assert {one.threads for one in found.values()} == {2}
    assert experiment.varied(settings, {}) == {"": settings}


def test_settings_are_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--set", "inner=2,3", "terms=4", "--out", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for inner in (2, 3):
        results = json.loads((tmp_path / f"inner={inner}" / "results.json").read_text())
        assert (results["settings"]["inner"], results["settings"]["terms"]) == (inner, 4)
        assert [o["hvps"] for o in results["outcomes"] if o["method"] in {"cg", "itd"}] == [24, 6 * inner]
        assert f"6 upper steps of {inner} lower ones" in printed
        assert f"] inner={inner}  seed 0  cg: test accuracy" in printed
    assert len(list((tmp_path / "cells").iterdir())) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("iner=3", "'iner' is no setting; did you mean 'inner'?"),
        ("inner=x", "inner=x came; expected a value like 5, of type int"),
        ("inner=2.5", "inner=2.5 came"),
        ("decay=x", "decay=x came; expected a value like 0.001, of type float"),
    ],
)
def test_settings_that_mean_nothing(change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--set", change, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "inner"], "expected a setting and its values"),
        (["--set", "inner=1,,2"], "expected a setting and its values"),
        (["--jobs", "0"], "expected an integer of at least 1"),
        (["--jobs", "2", "--dask", "here:8786"], "not allowed with argument"),
    ],
)
def test_words_that_mean_nothing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*SMALL, *words])
    assert message in capsys.readouterr().err


def test_a_cell_that_fails_is_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from paper_repro.hypercleaning import run

    def failing(s: Any) -> Any:
        raise RuntimeError("the solver is broken")

    right = run.METHODS["cg"]
    monkeypatch.setitem(run.METHODS, "cg", failing)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "hypercleaning: 1 of 3 cells failed:\n  seed 0  cg: RuntimeError: the solver is broken" in error
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setitem(run.METHODS, "cg", right)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 cells are in" in printed
    assert main([*SMALL, "--fresh", "--out", str(tmp_path)]) == 0
    assert "already" not in capsys.readouterr().out


def test_ctrl_c_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_repro.hypercleaning import run

    def pressed(s: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(run.METHODS, "itd", pressed)
    assert main([*SMALL, "--out", str(tmp_path)]) == 130
    assert "finished cells are in" in capsys.readouterr().err
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_other_code_is_refused_and_gives_other_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = experiment.versions()
    assert set(mine) == {"funcmlo", "python", "torch", "torchopt", "numpy", "code"}
    with pytest.raises(SweepError, match=r"has code \w+, not changed"):
        experiment._checked(noisy, mine | {"code": "changed"}, {}, {"seed": 0})
    assert main([*SMALL, "--methods", "cg", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(experiment, "versions", lambda: mine | {"code": "changed"})
    assert main([*SMALL, "--methods", "cg", "--out", str(tmp_path)]) == 0
    assert len(list((tmp_path / "cells").iterdir())) == 4


def started(words: list[str], out: Path) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "paper_repro", *words, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_sweep_goes_on(tmp_path: Path, jobs: str, how: signal.Signals) -> None:
    words = [*SMALL, "--seeds", "3", "--jobs", jobs, "--set", "outer=30"]
    with started(words, tmp_path / "whole") as process:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    with started(words, tmp_path / "killed") as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("[1/9]"))
        time.sleep(random.uniform(0, 0.3))
        os.killpg(process.pid, how)
        rest, _ = process.communicate(timeout=60)
        assert "Traceback" not in rest
        assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL), rest
    with started(words, tmp_path / "killed") as process:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    assert re.search(r"^[1-8] of 9 cells are in", printed, re.MULTILINE)
    assert outcomes(tmp_path / "killed") == outcomes(tmp_path / "whole")


# Dask.


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed")
    # One of the workers has two threads, which must take turns; nannies restart what a cell kills.
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, memory_limit=0
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.filterwarnings("default")  # Dask's own
def test_a_dask_cluster_gives_the_same_bits(client: Any, tmp_path: Path) -> None:
    cells = grid(seed=range(6))
    here = sweep(noisy, cells, threads=1, tell=None)
    there = sweep(noisy, cells, threads=1, backend="dask", out=tmp_path, tell=None)
    assert same(here, there)
    assert len(list((tmp_path / "cells").glob("*.cell"))) == 6
    with pytest.raises(SweepError, match="2 of 4 cells failed") as caught:
        sweep(troubled, grid(seed=range(4)), backend="dask", tell=None)
    assert caught.value.results == [0, None, None, 30]


@pytest.mark.filterwarnings("default")
def test_a_dask_worker_that_dies_takes_no_other_cell_with_it(client: Any) -> None:
    with pytest.raises(SweepError, match=r"1 of 4 cells failed:\n  seed=1: KilledWorker: Dask gave it up") as caught:
        sweep(deadly, grid(seed=range(4)), backend="dask", tell=None)
    assert caught.value.results == [0, None, 20, 30]


@pytest.mark.filterwarnings("default")
def test_a_single_dask_worker_runs_the_cells_itself() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        distributed.Client(cluster),
    ):
        (there,) = sweep(where, grid(seed=[0]), backend="dask", tell=None)
    assert there != os.getpid()


@pytest.mark.filterwarnings("default")
def test_the_command_line_runs_on_dask(client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--dask", client.scheduler.address, "--out", str(tmp_path / "there")]) == 0
    assert main([*SMALL, "--out", str(tmp_path / "here")]) == 0
    assert outcomes(tmp_path / "there") == outcomes(tmp_path / "here")
    assert main([*SMALL, "--dask", "tcp://127.0.0.1:9", "--out", str(tmp_path / "nowhere")]) == 1
    assert "No Dask scheduler answers at 'tcp://127.0.0.1:9'" in capsys.readouterr().err


def test_without_dask_the_error_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "paper_repro.dask_backend", raising=False)
    assert main([*SMALL, "--dask", "here:8786", "--out", str(tmp_path)]) == 1
    assert "pip install 'funcmlo[dask]'" in capsys.readouterr().err
    with pytest.raises(SweepError, match=r"pip install 'funcmlo\[dask\]'"):
        sweep(noisy, grid(seed=[0]), backend="dask", tell=None)
