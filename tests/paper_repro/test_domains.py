"""Pretrain, finetune, reweight: its parts, its Taylor tests, its command line, and what it is recorded to show."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import funcmlo as fm
from paper_repro import domains
from paper_repro.cli import main
from paper_repro.data import Dataset, load
from paper_repro.domains.baselines import BASELINES
from paper_repro.domains.learn import learn
from paper_repro.domains.methods import EXACT, METHODS, solved, unrolled, variant
from paper_repro.domains.newton import softmax_regression
from paper_repro.domains.paired import paired
from paper_repro.domains.presets import PRESETS, TUNED
from paper_repro.domains.problem import Domains, draw
from paper_repro.domains.run import baseline, method
from paper_repro.domains.styles import SOURCES, TARGET, restyle, tilted
from paper_repro.domains.taylor import SIZES, order, remainders

SMOKE = PRESETS["smoke"]["digits"]
DERIVATIVES = ("cg", "itd", "cg-per-example")
RECORDED = Path(domains.__file__).parent / "recorded"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def problem(digits: Dataset) -> Domains:
    return draw(digits, SMOKE, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("domains")
    assert main(["run", "domains", "--preset", "smoke", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    return {o["method"]: o for o in json.loads((folder / "results.json").read_text())["outcomes"]}


def test_the_command_line_writes_everything(folder: Path, outcomes: dict[str, Any]) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"] == asdict(SMOKE)
    assert {"torch", "funcmlo", "cores"} <= set(results["environment"])
    assert set(outcomes) == {*BASELINES, *METHODS}
    for name in METHODS:
        one = outcomes[name]
        assert len(one["curve"]) == len(one["cost"]) == SMOKE.outer + 1
        assert one["accuracy"] == one["curve"][-1]
        assert one["cost"][-1] < one["cost"][0]
        assert sum(one["relative"]) == pytest.approx(len(SOURCES))
        assert max(one["relative"]) > 1.05
    assert outcomes["cg"]["converged"] is True
    assert outcomes["itd"]["converged"] is None
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "table.txt").read_text()
    assert all(f"\n{name} " in text for name in outcomes)
    assert "NOT SOLVED" not in text


def test_list_says_that_it_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "domains: pretrain, finetune, reweight" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_the_hypergradient_is_a_derivative(name: str, place: str, outcomes: dict[str, Any]) -> None:
    # R(h) = |c₂h² + c₃h³ + …| moves the order away from 2 by about c₃h/c₂; h is at most 0.03 here.
    assert order(outcomes[name]["remainders"][place]) == pytest.approx(2, abs=0.1)


def test_the_identity_inverse_is_none(outcomes: dict[str, Any]) -> None:
    for found in outcomes["finite-difference"]["remainders"].values():
        assert order(found) == pytest.approx(1, abs=0.1)


class Short(fm.BestResponse):
    """AID, one per cent too short."""

    def vjp(self, at: Any, cotangent: Any, state: Any) -> Any:
        products, state, stats = EXACT.vjp(at, cotangent, state)
        return {name: 0.99 * x for name, x in products.items()}, state, stats


def test_the_taylor_test_sees_an_error_of_one_per_cent(problem: Domains) -> None:
    program = solved(problem, SMOKE, Short())
    zero = problem.classifier()
    state = program.init({"pretrain": zero, "finetune": zero, "reweight": problem.logits()})
    assert order(remainders(program, state)) < 1.9


def test_order() -> None:
    assert order([h**2 for h in SIZES]) == pytest.approx(2)
    assert order([3 * h for h in SIZES]) == pytest.approx(1)
    assert order([1.0, 4.0], [1.0, 2.0]) == pytest.approx(2)


def test_the_taylor_test_moves_the_cost_of_the_pipeline(problem: Domains) -> None:
    # V from `step` is the third level's cost behind the two solvers, called by hand.
    program = solved(problem, SMOKE, EXACT)
    zero = problem.classifier()
    reweight = torch.linspace(-1, 1, len(SOURCES), dtype=torch.float64)
    state = program.init({"pretrain": zero, "finetune": zero, "reweight": reweight})
    _, metrics = program.step(state, {})
    by_hand = problem.reweight(reweight, problem.pipeline(reweight))
    assert float(metrics["reweight"]["cost"]) == pytest.approx(float(by_hand), rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_paths_are_exact(name: str, problem: Domains) -> None:
    graph = METHODS[name](variant(problem, name), SMOKE).graph
    assert graph.exact("reweight")
    assert graph.paths("reweight") == (("reweight", "pretrain", "finetune"),)


def test_the_schedule_pretrains_before_every_update_of_finetune(problem: Domains) -> None:
    assert list(solved(problem, SMOKE, EXACT).schedule()) == ["pretrain", "finetune", "reweight"]
    inner = [*["pretrain"] * SMOKE.pretrain_steps, "finetune"]
    assert list(unrolled(problem, SMOKE).schedule()) == [*inner * SMOKE.finetune_steps, "reweight"]


@pytest.mark.parametrize("name", ["itd", "cg"])
def test_a_seed_decides_everything(name: str, digits: Dataset) -> None:
    settings = replace(SMOKE, outer=1)
    one, two, other = (learn(draw(digits, settings, seed), settings, name) for seed in (0, 0, 1))
    assert torch.equal(one.reweight, two.reweight)
    assert one.curve == two.curve
    assert not torch.equal(one.reweight, other.reweight)


def test_a_curve_tells_what_the_weights_of_its_states_are_worth(problem: Domains) -> None:
    learned = learn(problem, replace(SMOKE, outer=2), "cg")
    assert torch.equal(learned.states[0].params["reweight"], problem.logits())
    weights = [state.params["reweight"] for state in learned.states]
    assert len(weights) == 3
    assert learned.curve == [problem.accuracy(problem.pipeline(reweight)) for reweight in weights]
    costs = [float(problem.reweight(reweight, problem.pipeline(reweight))) for reweight in weights]
    assert learned.cost == pytest.approx(costs, rel=1e-9)
    assert torch.equal(learned.reweight, weights[-1])


def test_no_digit_is_dealt_twice(digits: Dataset) -> None:
    """Every digit carries its own number in place of its pixels, and tilting is left out."""
    numbered = replace(
        digits,
        x=torch.arange(len(digits.x)).float()[:, None].expand(-1, 64),
        x_test=-torch.ones(len(digits.x_test), 64),
    )
    plain = pytest.MonkeyPatch()
    with plain.context() as patch:
        patch.setattr("paper_repro.domains.problem.restyle", lambda x, style: x.double())
        tested, tuned = (draw(numbered, SMOKE, 0, tuning=tuning) for tuning in (False, True))
    assert (tested.x_test == -1).all()
    dealt = torch.cat([tuned.x, tuned.x_train, tuned.x_valid, tuned.x_test])[:, 0]
    assert sorted(dealt.tolist()) == list(range(len(digits.x)))
    assert torch.equal(tested.x, tuned.x)
    labels = digits.y[tuned.x[:, 0].long()]
    shifts = torch.tensor([source.label_shift for source in SOURCES])[tuned.source]
    assert torch.equal(tuned.y, (labels + shifts) % 10)
    assert int((shifts != 0).sum()) == SMOKE.per_source
    assert (len(tuned.x_train), len(tuned.x_valid)) == (SMOKE.train, SMOKE.valid)


def test_too_few_digits_are_an_error(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"digits has 1,297 training examples; 1,850 were asked for\."):
        draw(digits, replace(SMOKE, per_source=200), 0)


def test_weights(problem: Domains) -> None:
    n = len(problem.x)
    assert torch.allclose(problem.weights(problem.logits()), torch.full((n,), 1 / n, dtype=torch.float64))
    oracle = problem.weights(problem.oracle())
    helpful = torch.tensor([source.helpful for source in SOURCES])[problem.source]
    assert (oracle[~helpful] == 0).all()
    assert torch.allclose(oracle[helpful], torch.tensor(1 / (2 * SMOKE.per_source), dtype=torch.float64))
    each = problem.per_example()
    assert each.logits().shape == (n,)
    assert each.weights(torch.arange(n).double() - n).argsort().equal(torch.arange(n))


def test_validation_examples_join_those_to_finetune_on(problem: Domains) -> None:
    both = problem.with_validation()
    assert len(both.x_train) == len(both.y_train) == SMOKE.train + SMOKE.valid
    assert torch.equal(both.x_train[SMOKE.train :], problem.x_valid)
    assert torch.equal(both.y_train[SMOKE.train :], problem.y_valid)


def test_styles(digits: Dataset) -> None:
    images = digits.x[:5].double().reshape(-1, 1, 8, 8)
    assert torch.allclose(tilted(0)(images), images)
    assert torch.allclose(tilted(180)(images), images.flip(-1, -2), atol=1e-12)
    turned = {quarter: torch.rot90(images, quarter, (-2, -1)) for quarter in (1, -1)}
    assert any(torch.allclose(tilted(90)(images), one, atol=1e-12) for one in turned.values())
    x = restyle(digits.x[:5], TARGET)
    assert x.shape == (5, 65)
    assert x.dtype == torch.float64
    assert (x[:, -1] == 1).all()
    assert len({source.name for source in SOURCES}) == len(SOURCES)


def test_newton_finds_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=generator)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    centre, far = (10.0**k * torch.randn(4, 3, generator=generator, dtype=torch.float64) for k in (0, 2))

    def cost(theta: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(x @ theta, y, reduction="none")
        return weights @ losses + 1e-3 / 2 * ((theta - centre) ** 2).sum()

    for start in (torch.zeros(4, 3, dtype=torch.float64), far):
        found = softmax_regression(x, y, weights, 1e-3, centre=centre, start=start)
        # A curvature of at least 1e-3 makes a gradient of 1e-11 a distance of at most 1e-8.
        assert torch.linalg.vector_norm(torch.func.grad(cost)(found)) < 1e-11


def test_newton_says_so_where_it_does_not_arrive(problem: Domains, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paper_repro.domains.newton.ITERATIONS", 2)
    with pytest.raises(fm.EstimatorError, match=r"a gradient of norm .* is left after 2 iterations"):
        problem.pipeline(problem.logits())


def test_paired() -> None:
    found = paired([0.5, 0.7, 0.6], [0.4, 0.7, 0.4])
    assert (found.mean, found.wins, found.seeds) == (pytest.approx(0.1), 2, 3)
    assert found.error == pytest.approx(0.1 / math.sqrt(3))  # of 0.1, 0, 0.2, whose standard deviation is 0.1
    assert str(found) == "+0.100 ± 0.058"
    assert str(paired([0.5], [0.6])) == "-0.100"


def test_the_regularizers_are_those_that_were_tuned() -> None:
    rows = json.loads((RECORDED / "tuning.json").read_text())["rows"]
    chosen = {
        name: {part: dict(zip(("decay", "pull"), found["chosen"], strict=True)) for part, found in row.items()}
        for name, row in rows.items()
    }
    assert {name: asdict(tuned) for name, tuned in TUNED.items()} == chosen


def test_the_recorded_run_is_of_this_preset() -> None:
    recorded = json.loads((RECORDED / "digits-cpu.json").read_text())
    assert recorded["settings"] == asdict(PRESETS["cpu"]["digits"])
    assert recorded["tuned"] == {name: asdict(tuned) for name, tuned in TUNED.items()}
    assert recorded["seeds"] == [0, 1, 2, 3, 4]
    assert recorded["sources"] == [source.name for source in SOURCES]


@pytest.mark.slow
def test_the_third_level_helps_on_five_paired_seeds(digits: Dataset) -> None:
    settings = PRESETS["cpu"]["digits"]
    learned = [method(digits, settings, "cg", seed).accuracy for seed in range(5)]
    uniform = [baseline(digits, settings, "uniform", seed).accuracy for seed in range(5)]
    found = paired(learned, uniform)
    assert found.wins == 5
    assert found.error is not None
    assert found.mean > 3 * found.error
