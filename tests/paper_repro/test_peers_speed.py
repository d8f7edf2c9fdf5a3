"""The benchmark beside peers: every contender's hypergradient, the statistics, who is skipped, and the command line."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import funcmlo as fm
from paper_repro.cli import main
from paper_repro.peers import by_hand, cell, served, units, with_funcmlo
from paper_repro.peers.child import Job
from paper_repro.peers.contenders import CONTENDERS, Contender
from paper_repro.peers.problem import NotOfferedError, Problem, costs_of, flat
from paper_repro.peers.ratios import groups
from paper_repro.peers.reference import reference
from paper_repro.peers.report import summary
from paper_repro.peers.run import PRESETS
from paper_repro.peers.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
ASKED = [(name, estimator) for name, workload in WORKLOADS.items() for estimator in workload.estimators]
PRODUCTS = 3  # the tiny problems' linear systems are not yet solved, so each product shows


def problem(name: str, estimator: str, dtype: torch.dtype = torch.float64) -> Problem:
    return Problem(WORKLOADS[name], estimator, PRODUCTS, WORKLOADS[name].drawn("smoke", seed=0), dtype)


def apart(given: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


# The hypergradients


@pytest.mark.parametrize(("name", "estimator"), ASKED)
def test_this_library_computes_the_reference(name: str, estimator: str) -> None:
    asked = problem(name, estimator)
    # A central difference of length h errs by h²; its length here is about ε^½, and a ReLU's kink may lie within.
    tolerance = 1e-5 if estimator == "difference" else 1e-9
    for variant in ("", *with_funcmlo.MEMORY) if estimator == "itd" and not asked.workload.tasks else ("",):
        assert apart(flat(with_funcmlo.prepare(asked, variant)()), reference(asked)) < tolerance, variant


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")
@pytest.mark.parametrize(
    ("name", "estimator"),
    [pytest.param(*asked, marks=[] if asked == ("convnet", "cg") else [pytest.mark.slow]) for asked in ASKED],
)
def test_compiled_it_computes_the_reference_too(name: str, estimator: str) -> None:
    asked = problem(name, estimator)
    assert apart(flat(with_funcmlo.prepare(asked, "compiled")()), reference(asked)) < (
        1e-5 if estimator == "difference" else 1e-9
    )


def questions() -> Iterator[Any]:
    """What the other contenders are asked; XLA compiles for seconds."""
    for contender in CONTENDERS.values():
        for name, estimator in ASKED:
            slow = contender.kind == "jax" and name != "logistic"
            offered = contender.name != "by-hand" and contender.kind != "own"
            if offered and replace(contender, module=None).refusal(WORKLOADS[name], estimator) is None:
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(contender, name, estimator, marks=marks, id=f"{contender.name}-{name}-{estimator}")


@pytest.mark.filterwarnings("ignore")  # old libraries use torch's old names
@pytest.mark.parametrize(("contender", "name", "estimator"), [*questions()])
def test_peers_that_are_installed_compute_the_reference(contender: Contender, name: str, estimator: str) -> None:
    asked = problem(name, estimator, torch.float32)
    if not contender.installed():
        pytest.skip(f"{contender.module} is not installed")
    if contender.kind == "jax":  # its threads would make every later fork of this process unsafe
        command = [
            sys.executable,
            "-m",
            "tests.paper_repro.test_peers_speed",
            contender.adapter,
            contender.variant,
            name,
            estimator,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert float(done.stdout) < (0.05 if estimator == "difference" else 1e-4)
        return
    adapter = importlib.import_module(f"paper_repro.peers.{contender.adapter}")
    call = adapter.prepare(asked, contender.variant)
    error = apart(flat(call()), reference(asked))
    # boat takes its difference where the loop begins; betty's conjugate gradient is none after its first product.
    wrong = (contender.name, estimator) in {("boat", "difference"), ("betty", "cg")}
    assert (error > 1e-3) if wrong else error < (0.05 if estimator == "difference" else 1e-4)
    assert apart(flat(call()), reference(asked)) == pytest.approx(error, abs=1e-5)  # the start is put back


def test_the_reference_is_the_slope_of_what_the_steps_lead_to() -> None:
    asked = problem("logistic", "itd")
    costs, start = costs_of(asked), asked.tensors(asked.drawn.start)
    hyper = asked.tensors(asked.drawn.hyper)

    def value(shift: float) -> float:
        x = {name: p + shift for name, p in hyper.items()}
        return float(costs.outer(x, by_hand.solution(asked, costs, start, x)).detach())

    assert (value(1e-5) - value(-1e-5)) / 2e-5 == pytest.approx(reference(asked).sum(), rel=1e-6)


def test_products_are_as_many_as_are_asked() -> None:
    """Each of the library's solvers makes all products: what is timed is the same work."""
    for name in ("logistic", "mlp", "convnet", "transformer"):
        for estimator in ("cg", "neumann"):
            asked = problem(name, estimator)
            program = with_funcmlo.levels(asked, None)
            state = program.init({"y": asked.tensors(asked.drawn.start), "x": asked.tensors(asked.drawn.hyper)})
            data = asked.tensors(asked.drawn.data)
            _, stats = program.hypergradient(state, {"y": data, "x": data}, of="x", with_stats=True)
            assert stats["y"].hvps == PRODUCTS, (name, estimator)


# Statistics


def outcome(*walls: float, error: float | None = 1e-7, peak: float | None = None) -> dict[str, Any]:
    return {
        "first": 5.0,
        "walls": list(walls),
        "processors": [2 * wall for wall in walls],
        "error": error,
        "peak": None if peak is None else peak * 1e6,
    }


def row(**outcomes: dict[str, Any]) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in outcomes.items()}
    return {"workload": "mlp", "estimator": "itd", "model": 2.0, "units": {}, "outcomes": named}


def test_ratios_are_of_medians() -> None:
    (group,) = groups([
        row(
            by_hand=outcome(4, 3, 90, peak=100),
            by_hand_recompute=outcome(6, 6, 6, peak=20),
            higher=outcome(5, 4.5, 4, peak=200),
            jax=outcome(1, 1, 1),
            funcmlo=outcome(3, 3, 2, error=None, peak=80),
            funcmlo_mixed=outcome(8, 8, 8, peak=10),
            boat={"skipped": "boat_torch is not installed"},
        )
    ])
    lines = {line.contender: line for line in group.lines}
    assert [lines[name].seconds for name in ("by-hand", "higher", "funcmlo")] == [4, 4.5, 3]
    assert [lines[name].to_peer for name in ("by-hand", "funcmlo", "jax")] == [1, 0.75, 0.25]
    assert lines["funcmlo"].to_all == 3
    assert lines["funcmlo"].to_model == 1.5
    assert lines["funcmlo"].processor == 6
    assert lines["funcmlo"].first == 2
    assert [lines[name].to_peak for name in ("funcmlo", "funcmlo-mixed", "jax")] == [0.8, 0.5, None]
    (small,) = groups([row(by_hand=outcome(1, peak=0.5), funcmlo=outcome(1, peak=0.7))])
    assert small.lines[1].to_peak is None
    text = summary([group], "cpu")
    assert "not measured: boat (itd): boat_torch is not installed" in text
    assert "not finite" in text


def test_several_seeds_are_one() -> None:
    (group,) = groups([row(by_hand=outcome(1, 2, 3, error=1e-7)), row(by_hand=outcome(3, 4, 5, error=1e-5))])
    assert (group.lines[0].seconds, group.lines[0].error) == (3, 1e-5)


def test_the_model_counts_gradients_and_products() -> None:
    seconds = {"gradient": 1.0, "outer": 10.0, "joint": 100.0, "graph": 1000.0, "product": 1e4, "cross": 1e6, "slope": 0.5}
    assert units.model(problem("convnet", "itd"), seconds) == 5 * 101 + 10
    assert units.model(problem("convnet", "cg"), seconds) == 5 + 10 + 1000 + PRODUCTS * 1e4 + 1e6
    assert units.model(problem("convnet", "difference"), seconds) == 5 + 10 + 1
    assert units.model(problem("maml-mlp", "itd"), seconds) == 3 * (5 * 101 + 10)
    for name, estimator in ASKED:
        measured = units.units(problem(name, estimator))
        assert units.model(problem(name, estimator), {unit: 1.0 for unit in measured if measured[unit]() is not None}) > 0


def test_an_error_that_is_not_finite_is_none() -> None:
    assert cell.apart([float("nan"), 1.0], np.array([1.0, 1.0])) is None
    assert cell.apart([1.0, 1.1], np.array([1.0, 1.0])) == pytest.approx(0.1 / 2**0.5)


# Skipping


def test_an_absent_peer_is_skipped_by_name() -> None:
    absent = replace(CONTENDERS["boat"], module="no_module_of_this_name")
    assert absent.refusal(WORKLOADS["mlp"], "cg") == "no_module_of_this_name is not installed"
    assert "iterative problems" in str(CONTENDERS["betty"].missing["itd"])


def test_a_program_without_compile_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(fm.Multilevel, "compile"):
        monkeypatch.delattr(fm.Multilevel, "compile")
    with pytest.raises(NotOfferedError, match="no compile"):
        with_funcmlo.prepare(problem("logistic", "cg"), "compiled")
    with pytest.raises(NotOfferedError, match="small problems alone"):
        with_funcmlo.prepare(problem("mlp", "cg"), "whole")


def test_compiled_contenders_are_programs_that_compile_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compiled(program: fm.Multilevel, *, unroll: str = "step") -> fm.Multilevel:
        asked.append(unroll)
        return program

    monkeypatch.setattr(fm.Multilevel, "compile", compiled, raising=False)
    for variant in ("", "compiled", "whole"):
        call = with_funcmlo.prepare(problem("logistic", "cg"), variant)
        assert apart(flat(call()), reference(problem("logistic", "cg"))) < 1e-9
    assert asked == ["step", "whole"]


def test_a_process_that_dies_is_told_with_its_last_words() -> None:
    with served.processes([Job("no-workload", "smoke", 0, "itd", 3, "reference", 1)]) as (process,):
        with pytest.raises(served.DiedError, match="KeyError: 'no-workload'"):
            process.hear()
        assert "ended with status" in cell.heard(process, "warm")["skipped"]


# The command line


def test_the_command_line_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "maml-mlp", "--methods", "funcmlo", "funcmlo-mixed", "--out", str(tmp_path)]
    assert main(["run", "peers", "--preset", "smoke", *words]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["rounds"] == PRESETS["smoke"].rounds
    assert results["surroundings"]["OMP_WAIT_POLICY"] == "PASSIVE"
    (group,) = results["groups"]
    assert [line["contender"] for line in group["lines"]] == ["by-hand", "funcmlo"]
    assert all(line["error"] < 1e-4 and line["seconds"] > 0 and line["peak"] >= 0 for line in group["lines"])
    assert set(group["skipped"]) == {"funcmlo-mixed"}
    assert len(results["rows"][0]["outcomes"]["funcmlo"]["walls"]) == PRESETS["smoke"].rounds
    assert "not measured: funcmlo-mixed (itd): measured without tasks" in printed
    assert (tmp_path / "table.txt").read_text() in printed
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_left_out_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "smoke", "--dataset", "maml-mlp", "--out", str(tmp_path)]
    assert main(["run", "peers", *words, "--set", "itd=False"]) == 1
    assert "No hypergradient of maml-mlp is left" in capsys.readouterr().err
    assert cell.cell(settings=replace(PRESETS["smoke"], cg=False), method="mlp cg", seed=0) is None


def test_cells_do_not_run_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "peers", "--preset", "smoke", "--jobs", "2", "--out", str(tmp_path)]) == 1
    assert "the machine to itself" in capsys.readouterr().err


if __name__ == "__main__":
    question = problem(*sys.argv[3:], torch.float32)
    adapted = importlib.import_module(f"paper_repro.peers.{sys.argv[1]}").prepare(question, sys.argv[2])
    print(apart(flat(adapted()), reference(question)))
