"""The command line end to end on the smoke preset, and the pieces of hyper-cleaning."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import funcmlo as fm
from paper_repro.cli import main
from paper_repro.data import Dataset, load
from paper_repro.hypercleaning.methods import METHODS, program
from paper_repro.hypercleaning.problem import Settings, auc, draw, fit, logits
from paper_repro.hypercleaning.reference import compare, reference
from paper_repro.results import spread, table

SETTINGS = Settings(train=200, valid=100, outer=3, inner=5)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_the_command_line_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "hypercleaning", "--preset", "smoke", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for method in ("noisy labels", "oracle", *METHODS):
        assert re.search(rf"^{method} .* ± ", printed, re.MULTILINE), method
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["settings"]["outer"] == 6
    assert {"torch", "funcmlo", "torchopt", "cores"} <= set(results["environment"])
    assert len(results["outcomes"]) == 2 * (3 + len(METHODS))
    by_method = {o["method"]: o for o in results["outcomes"] if o["seed"] == 0}
    assert by_method["cg"]["hvps"] == 6 * 10
    assert by_method["itd"]["hvps"] == 6 * 5
    assert by_method["finite-difference"]["hvps"] == 0
    assert by_method["cg"]["reference"] == "dense"
    assert all(0 < by_method[m]["auc"] < 1 and by_method[m]["error"] > 0 for m in METHODS)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.txt").read_text() in printed + "\n"


def test_one_method_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "hypercleaning", "--preset", "smoke", "--methods", "cg", "--dataset", "digits", "--out", str(tmp_path)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "cg" in printed
    assert "neumann" not in printed


def test_list_says_what_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for word in ("hypercleaning", "digits, mnist, fashion-mnist", "smoke, cpu, paper", "finite-difference"):
        assert word in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nothing"], "invalid choice: 'nothing'"),
        (["run", "hypercleaning", "--methods", "magic"], "invalid choice: 'magic'"),
        (["run", "hypercleaning", "--seeds", "0"], "expected an integer of at least 1"),
        ([], "required: command"),
    ],
)
def test_words_that_mean_nothing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_data_that_fails_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(b"damaged")
    words = ["run", "hypercleaning", "--dataset", "mnist", "--preset", "smoke", "--data-dir", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("hypercleaning: ")


def test_half_of_the_labels_are_wrong_and_the_draw_repeats(digits: Dataset) -> None:
    one, two, other = (draw(digits, SETTINGS, seed) for seed in (0, 0, 1))
    assert int((~one.clean).sum()) == 100
    assert torch.equal(one.given, two.given)
    assert not torch.equal(one.given, other.given)
    assert one.x.shape == (200, 64)
    assert one.x_valid.shape == (100, 64)
    # Every class but the true one is drawn.
    shift = (one.given - one.true)[~one.clean] % 10
    assert set(shift.tolist()) == set(range(1, 10))
    with pytest.raises(ValueError, match="1,297 training examples"):
        draw(digits, replace(SETTINGS, train=2_000), 0)


def test_fit_finds_the_minimum(digits: Dataset) -> None:
    problem = draw(digits, SETTINGS, 0)
    x, y = problem.x.double(), problem.given
    start = {k: v.double() for k, v in problem.classifier().items()}
    solution = fit(x, y, start, decay=1e-2)

    def cost(classifier):
        squared = sum((p**2).sum() for p in classifier.values())
        return torch.nn.functional.cross_entropy(logits(classifier, x), y) + 1e-2 * squared

    gradient = torch.func.grad(cost)(solution)
    # 2λ = 0.02 is the least curvature: a gradient of 1e-8 is a distance of at most 5e-7 from the minimizer.
    assert max(float(g.abs().max()) for g in gradient.values()) < 1e-8


def test_auc() -> None:
    positive = torch.tensor([True, True, False, False])
    assert auc(torch.tensor([3.0, 2.0, 1.0, 0.0]), positive) == 1.0
    assert auc(torch.tensor([0.0, 1.0, 2.0, 3.0]), positive) == 0.0
    assert auc(torch.zeros(4), positive) == 0.5
    assert auc(torch.tensor([3.0, 1.0, 2.0, 0.0]), positive) == 0.75


def test_the_reference_is_the_limit_of_the_methods(digits: Dataset) -> None:
    # With the lower problem solved and the linear system too, the program's hypergradient is the reference.
    settings = replace(SETTINGS, decay=1e-2)
    problem = draw(digits, settings, 0)
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    exact, how = reference(problem, settings, weights)
    assert how == "dense"
    from paper_repro.hypercleaning.problem import minimize

    start = {k: v.double() for k, v in problem.classifier().items()}
    solved = minimize(lambda classifier: problem.lower(classifier, weights), start)
    p = program(problem, settings, fm.AID(fm.CG(500, tol=1e-12)))
    answer = p.hypergradient(p.init({"classifier": solved, "weights": weights}), {}, of="weights", solve=False)
    error, cosine = compare(answer, exact)
    assert error < 1e-6
    assert cosine > 1 - 1e-9


def test_table_and_spread() -> None:
    assert spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert spread([1.0], ".1f") == "1.0"
    assert spread([None], ".1f") == "–"
    assert table(["a", "bb"], [["x", "1"], ["yy", "22"]]) == "a   bb\n--  --\nx    1\nyy  22"
