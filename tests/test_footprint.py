"""The predicted memory of a hypergradient, against what is counted in tensors and what a process takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torchopt

import funcmlo as fm
from funcmlo.comparing.peak_memory import peak_memory
from funcmlo.comparing.substitution import Place
from funcmlo.footprint.law import law, standings
from tests.benchmarks.memory import MODES, cell, problem
from tests.oracles import bits
from tests.programs import SGD

STEPS, LAYERS, BATCH = 30, (8, 40, 40, 3), 16
RESPONSES = [
    fm.ITD(),
    fm.ITD(window=12),
    fm.ITD(memory="recompute"),
    fm.ITD(memory="recompute", window=2),
    fm.ITD(memory="mixed"),
    fm.ITD(memory=fm.Checkpoint()),
    fm.ITD(memory=fm.Checkpoint(arity=2)),
    fm.ITD(memory=fm.Checkpoint(arity=3, mixed=True)),
    fm.ITD(mode="forward"),
    fm.ForwardGradient(2),
    fm.AID(fm.CG(4)),
    fm.AID(fm.Neumann(4, scale=0.01)),
    fm.FiniteDifference(),
    fm.OneStep(),
]


@pytest.mark.parametrize("optimizer", [SGD, torchopt.adam(1e-3)], ids=["sgd", "adam"])
def test_predictions_are_what_is_counted(optimizer: object) -> None:
    program, state, batches = problem(fm.ITD(), optimizer, STEPS, LAYERS, BATCH)
    before = bits(state)
    report = program.memory(state, batches, of="decay", responses=RESPONSES)
    assert bits(state) == before
    place = Place(program, "decay", ("student",))
    for row, response in zip(report, RESPONSES, strict=True):
        assert row.reason is None
        assert all(max(steps) <= 5 for steps in row.measured)
        _, counted = peak_memory(lambda response=response: place.run(response, state, batches))
        # A window's first standing, which is the state's own for a loop of few steps, and costs of 4 bytes a step.
        slack = 0.1 if getattr(response, "window", None) else 0.005
        assert abs(row.peak - counted) <= slack * counted, row.name


def test_a_loop_of_few_steps_is_measured_itself() -> None:
    program, state, batches = problem(fm.ITD(), SGD, 2, LAYERS, BATCH)
    (row,) = program.memory(state, batches, of="decay", responses=[fm.ITD()])
    assert row.measured == {(2,): row.peak}
    assert row.peak == peak_memory(lambda: program.hypergradient(state, batches, of="decay"))[1]


def test_levels_below_one_another_add_up() -> None:
    def middle(z: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return ((z - y) ** 2).sum() + (x * z**2).sum()

    def program(steps: tuple[int, int]) -> fm.Multilevel:
        return fm.Multilevel(
            fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), SGD, steps=steps[0], response=fm.ITD(memory="recompute")),
            fm.Level("z", middle, SGD, steps=steps[1], response=fm.ITD(memory="recompute")),
            fm.Level("x", lambda x, z: z.sum(), SGD),
        )

    whole = program((6, 9))
    state = whole.init({"y": torch.zeros(5000), "z": torch.zeros(5000), "x": torch.ones(())})
    (row,) = whole.memory(state, {}, of="x", responses=[fm.ITD(memory="recompute")])
    _, counted = peak_memory(lambda: whole.hypergradient(state, {}, of="x"))
    assert abs(row.peak - counted) <= 0.01 * counted
    assert "Of several levels" in str(whole.memory(state, {}, of="x", responses=[fm.OneStep()]))


@pytest.mark.parametrize("mode", ["store", "recompute", "mixed", "Checkpoint()", "forward"])
def test_predictions_are_what_a_process_takes(mode: str) -> None:
    layers, steps = (64, 320, 320, 10), 40
    found = cell(mode=mode, steps=steps, layers=layers, batch=256)
    response = eval(MODES[mode], vars(fm))
    program, state, batches = problem(response, SGD, steps, layers, 256)
    (row,) = program.memory(state, batches, of="decay", responses=[response])
    # What an operation takes inside, and the allocator: 15 %, and 2 MB.
    assert abs(row.peak - found.peak) <= 0.15 * found.peak + 2e6


def test_standings_of_schedules() -> None:
    for steps in (1, 2, 3, 5, 16, 90, 100, 1000):
        root = standings(fm.Checkpoint(), steps)
        assert root <= 2 * -(-(steps**0.5) // 1)
        for k in (2, 3, 5):
            assert standings(fm.Checkpoint(arity=k), steps) <= 1 + (k - 1) * 11
    assert [standings(fm.Checkpoint(arity=2), 2**n) for n in range(6)] == [1, 2, 3, 4, 5, 6]


def test_an_estimator_of_ones_own_tells_what_it_keeps() -> None:
    class Mine(fm.BestResponse):
        def vjp(self, solved: object, cotangent: object, state: object) -> object:
            raise RuntimeError("not today")

    assert law(Mine()).words == "flat"
    program, state, batches = problem(fm.ITD(), SGD, 3, LAYERS, BATCH)
    report = program.memory(state, batches, of="decay", responses=[Mine(), fm.FiniteDifference()])
    assert report["Mine()"].reason == "RuntimeError: not today"
    assert report.least().name == "FiniteDifference()"
    assert "Mine() did not run: RuntimeError: not today." in str(report)


def test_the_report_prints_itself() -> None:
    program, state, batches = problem(fm.ITD(), SGD, 300, LAYERS, BATCH)
    report = program.memory(state, batches, of="decay")
    text = str(report)
    assert "through the inner steps: 300 of 'student'" in text
    assert [row.name for row in report][-2:] == ["AID(CG(10))", "FiniteDifference()"]
    assert "ITD(mode='forward')" in text
    assert "2√T" in report._repr_html_()
    assert len(report) == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.of = "x"
    with pytest.raises(fm.DefinitionError, match=r"the report has no .*; did you mean 'ITD\(memory='mixed'\)'\?"):
        report["ITD(memory='mix')"]


def test_wrong_use() -> None:
    program, state, batches = problem(fm.ITD(), SGD, 3, LAYERS, BATCH)
    with pytest.raises(fm.DefinitionError, match="level 'student' is not differentiated through any level"):
        program.memory(state, batches, of="student")
    with pytest.raises(fm.DefinitionError, match="expected best responses such as"):
        program.memory(state, batches, of="decay", responses=["ITD()"])
