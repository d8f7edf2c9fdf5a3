"""Learned learning rates: ordinary training, hypergradients, the command line, and what is recorded."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import funcmlo as fm
from paper_repro import learning_rates
from paper_repro.cli import main
from paper_repro.data import Dataset, load
from paper_repro.learning_rates.differences import relative_error
from paper_repro.learning_rates.learn import learn
from paper_repro.learning_rates.methods import METHODS, program
from paper_repro.learning_rates.problem import Problem, Settings, draw
from paper_repro.learning_rates.report import reached
from paper_repro.learning_rates.run import PRESETS
from paper_repro.learning_rates.search import least, rates, search, train

SMOKE = PRESETS["smoke"]["digits"]
FROM_BELOW = [name for name in METHODS if name != "from-above"]
REACH = ("one-rate", "rate-and-momentum", "per-layer", "per-step", "per-parameter")
RECORDED = Path(learning_rates.__file__).parent / "recorded" / "digits-cpu.json"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def problem(digits: Dataset) -> Problem:
    return draw(digits, SMOKE, seed=0)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(RECORDED.read_text())


def test_the_command_line_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "learning-rates", "--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == asdict(SMOKE)
    assert len(results["outcomes"]) == 2 * (2 + len(METHODS))
    for name in ("grid", "fine", *METHODS):
        assert f"\n{name} " in printed
    for outcome in results["outcomes"]:
        assert outcome["method"] in ("grid", "fine", "from-above") or max(outcome["errors"]) < 1e-6
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.txt").read_text() in printed


def test_the_grid_is_what_it_says() -> None:
    grid = rates(SMOKE, 10)
    assert grid[0] == pytest.approx(1e-3)
    assert grid[-1] == pytest.approx(10.0)
    assert all(b / a == pytest.approx(10 ** (4 / 9)) for a, b in pairwise(grid))


@pytest.mark.parametrize("method", METHODS)
def test_a_program_trains_as_torch_optim_does(problem: Problem, method: str) -> None:
    # At one and the same rate all methods are gradient descent with momentum at a falling rate.
    begin = METHODS[method].start(problem, SMOKE)
    rate = 0.3
    begin = {name: x if name == "logit" else torch.full_like(x, rate).log() for name, x in begin.items()}
    learner = program(problem, SMOKE, method)
    state, metrics = learner.step(learner.init({"rates": begin}), {})
    expected = train(problem, SMOKE, rate)
    for name, p in expected.items():
        # ten steps, each with a few roundings of numbers of size one
        assert torch.allclose(state.params["classifier"][name], p, rtol=0, atol=1e-13), name
    assert float(metrics["rates"]["cost"]) == pytest.approx(problem.score(expected).valid, rel=1e-12)


@pytest.mark.parametrize("method", FROM_BELOW)
def test_the_hypergradient_is_the_derivative(problem: Problem, method: str) -> None:
    learner = program(problem, SMOKE, method)
    state = learner.init({"rates": METHODS[method].start(problem, SMOKE)})
    # From here the loss falls by about 1e-3 for a unit of the logarithm; its 1e-16 over a step of 1e-4 is 1e-9 of that.
    assert relative_error(learner, state) < 1e-8
    away = {name: x + 1.0 + 0.1 * torch.randn_like(x) for name, x in state.params["rates"].items()}
    moved = replace(state, params={**state.params, "rates": away})
    value, error = fm.testing.finite_difference(learner, moved, {}, of="rates", direction=away)
    gradient = learner.hypergradient(moved, {}, of="rates")
    slope = sum(float((gradient[name] * x).sum()) for name, x in away.items())
    assert abs(slope - float(value)) <= max(10 * float(error), 1e-8 * abs(slope))


def test_a_wrong_hypergradient_is_told(problem: Problem) -> None:
    class Scaled(fm.Multilevel):
        def hypergradient(self, *given: Any, **how: Any) -> Any:
            return {name: 1.0001 * g for name, g in super().hypergradient(*given, **how).items()}

    right = program(problem, SMOKE, "one-rate")
    wrong = Scaled(*right.levels)
    state = right.init({"rates": METHODS["one-rate"].start(problem, SMOKE)})
    assert relative_error(wrong, state) == pytest.approx(1e-4, rel=1e-3)


def test_every_training_begins_at_the_same_start(problem: Problem) -> None:
    learned = learn(problem, SMOKE, "one-rate")
    again = learned.program.init({"rates": learned.path[-1]})
    assert float(learned.program.cost(again, {}, of="rates")) == learned.scores[-1].valid
    assert learned.scores[learned.best].valid == min(score.valid for score in learned.scores)


def test_one_run_reaches_the_grid(digits: Dataset) -> None:
    # A seed that the settings were not chosen on, and a problem of a fifth of the size.
    settings = replace(Settings(), train=200, valid=300, hidden=8, inner=40)
    problem = draw(digits, settings, seed=11)
    _, best = least(search(problem, settings, settings.grid))
    learned = learn(problem, settings, "one-rate")
    assert learned.scores[learned.best].valid <= best.valid


def test_reached_has_no_tolerance() -> None:
    assert reached([1.0, 2.0, 3.0], [1.0, 1.9999, 3.1]) == 2


def test_too_much_is_asked_for(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"1,297 training examples; 1,200 \+ 797"):
        draw(digits, replace(SMOKE, train=1_200, valid=797), seed=0)


def test_what_is_recorded_is_what_is_claimed(recorded: dict[str, Any]) -> None:
    assert recorded["settings"] == asdict(PRESETS["cpu"]["digits"])
    assert recorded["seeds"] == [0, 1, 2, 3, 4]
    by_name = {name: [o for o in recorded["outcomes"] if o["method"] == name] for name in ("grid", "fine", *METHODS)}
    grid = [o["valid"] for o in by_name["grid"]]
    for name in REACH:
        assert reached([o["valid"] for o in by_name[name]], grid) == 5, name
    assert reached([o["last"] for o in by_name["one-rate"]], grid) == 5
    for name in FROM_BELOW:
        # The table's largest is 3e-8, with momentum at the edge of stability, where the differences' own error grows.
        assert max(error for o in by_name[name] for error in o["errors"]) < (1e-7 if "momentum" in name else 1e-8), name
    for name in ("momentum-from-below", "from-above"):
        assert reached([o["valid"] for o in by_name[name]], grid) < 5, name


def test_a_recorded_grid_is_found_again(digits: Dataset, recorded: dict[str, Any]) -> None:
    settings = PRESETS["cpu"]["digits"]
    problem = draw(digits, settings, seed=0)
    grid = next(o for o in recorded["outcomes"] if o["method"] == "grid" and o["seed"] == 0)
    for rate, valid in grid["path"][3:6]:  # beyond, training amplifies rounding
        assert problem.score(train(problem, settings, rate)).valid == pytest.approx(valid, rel=1e-6)
