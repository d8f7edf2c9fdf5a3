"""Time to accuracy: the course, the quasi-Newton memory, the rules, the command line."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import funcmlo as fm
from funcmlo.operators import Operator
from paper_repro.cli import main
from paper_repro.hypercleaning.problem import minimize
from paper_repro.peers_accuracy import run as running
from paper_repro.peers_accuracy import worker
from paper_repro.peers_accuracy.contenders import CONTENDERS, LINEAR, Contender, Knobs
from paper_repro.peers_accuracy.course import Course, record
from paper_repro.peers_accuracy.quasi_newton import Memory, Shared, quasi_newton
from paper_repro.peers_accuracy.report import fastest_peer
from paper_repro.peers_accuracy.run import PRESETS, Outcome

SMOKE = PRESETS["smoke"]
COMPILES = shutil.which("g++") is not None
HERE = [one for one in CONTENDERS.values() if one.library in (None, "funcmlo")]
HERE = [one for one in HERE if COMPILES or one.name != "funcmlo-compiled"]


@pytest.fixture(scope="module")
def course() -> Course:
    return record(SMOKE, seed=0)


# The course


def test_the_course_has_the_slopes_of_the_solved_problem(course: Course) -> None:
    """The upper cost, the lower problem solved anew at x ± hd, by a central difference."""
    problem, x = SMOKE.problem(seed=0), course.weights[2]
    d = torch.randn(len(x), dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    start = {name: p.double() for name, p in problem.classifier().items()}

    def cost(x: Tensor) -> Tensor:
        return problem.upper(x, minimize(lambda y: problem.lower(y, x), start))

    h = 1e-2  # L-BFGS leaves the cost about 1e-9 off, and h² of its third derivative is left
    slope = (cost(x + h * d) - cost(x - h * d)) / (2 * h)
    torch.testing.assert_close(course.gradients[2] @ d, slope, rtol=1e-4, atol=0)


def test_the_course_is_adams(course: Course) -> None:
    torch.testing.assert_close(course.weights[1], -SMOKE.upper_lr * course.gradients[0].sign(), rtol=1e-4, atol=0)
    assert len(course.weights) == SMOKE.outer


# The memory


def remembered(h: Tensor, pairs: int, memory: int) -> Memory:
    """The memory after gradients of ½yᵀHy at random points, in one long inner loop."""
    generator, p = torch.Generator().manual_seed(1), len(h)
    optimizer = quasi_newton(memory, steps=pairs + 1, rate=0.3)
    state = optimizer.init(torch.zeros(p, dtype=h.dtype))
    for _ in range(pairs + 1):
        y = torch.randn(p, dtype=h.dtype, generator=generator)
        _, state = optimizer.update(h @ y, state, params=y)
    return state


def by_the_book(pairs: list[tuple[Tensor, Tensor]], gamma: Tensor) -> Tensor:
    """BFGS's update of the inverse, pair by pair, as a matrix (Nocedal and Wright, eq. 6.17)."""
    eye = torch.eye(len(pairs[0][0]), dtype=gamma.dtype)
    b = gamma * eye
    for s, u in pairs:
        rho = 1 / (s @ u)
        b = (eye - rho * torch.outer(s, u)) @ b @ (eye - rho * torch.outer(u, s)) + rho * torch.outer(s, s)
    return b


@pytest.mark.parametrize(("pairs", "memory"), [(1, 6), (4, 6), (6, 6), (9, 6)])
def test_the_memory_is_bfgs(pairs: int, memory: int) -> None:
    p = 8
    root = torch.randn(p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = remembered(root @ root.T + torch.eye(p), pairs, memory)
    kept = [(s, u) for s, u in zip(state.moves, state.changes, strict=True) if s.norm() > 0]
    assert len(kept) == min(pairs, memory)
    s, u = kept[-1]
    dense = by_the_book(kept, (s @ u) / (u @ u))
    found = torch.stack([state.inverse(e, rate=0.3) for e in torch.eye(p, dtype=torch.float64)])
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-9 * float(dense.abs().max()))


def test_two_loops_make_no_pair_and_no_pair_is_the_rate() -> None:
    y = torch.ones(3, dtype=torch.float64)
    optimizer = quasi_newton(4, steps=2, rate=0.3)
    step, first = optimizer.update(y, optimizer.init(y), params=y)
    torch.testing.assert_close(step, -0.3 * y, rtol=1e-15, atol=0)
    _, second = optimizer.update(2 * y, first, params=2 * y)
    _, third = optimizer.update(7 * y, second, params=3 * y)  # of the next loop, at other weights
    assert [int((state.gram.diagonal() > 0).sum()) for state in (first, second, third)] == [0, 1, 1]
    torch.testing.assert_close(third.gradient, 7 * y)


def test_a_pair_of_negative_curvature_is_left_out() -> None:
    y = torch.ones(3, dtype=torch.float64)
    optimizer = quasi_newton(4, steps=9, rate=0.3)
    _, state = optimizer.update(y, optimizer.init(y), params=y)
    _, after = optimizer.update(0 * y, state, params=2 * y)
    assert not after.moves.any()
    assert not after.gram.any()


def test_the_solve_is_preconditioned_by_the_inner_loop(course: Course) -> None:
    """One solve from zero at the same point, with the memory and without: the same answer for fewer products."""
    problem = SMOKE.problem(seed=0)
    made = {}
    for preconditioner in (None, Shared(rate=1.0)):
        response = fm.AID(fm.CG(300, tol=1e-10, preconditioner=preconditioner))
        program = fm.Multilevel(
            fm.Level("classifier", problem.lower, quasi_newton(60, 60, rate=1.0), steps=60, response=response),
            fm.Level("weights", problem.upper, fm.optim.sgd(0.0)),
        )
        start = {name: p.double() for name, p in problem.classifier().items()}
        state = program.init({"classifier": start, "weights": course.weights[2]})
        made[preconditioner] = program.hypergradient(state, {}, of="weights", with_stats=True)
    (plain, stats), (helped, fewer) = made.values()
    torch.testing.assert_close(helped, plain, rtol=1e-7, atol=1e-8 * float(plain.abs().max()))
    assert course.error(2, helped) < 1e-5
    assert fewer["classifier"].hvps < 0.8 * stats["classifier"].hvps


def test_the_preconditioner_looks_at_its_point() -> None:
    state = remembered(2 * torch.eye(3, dtype=torch.float64), 1, 2)
    r = torch.ones(3, dtype=torch.float64)
    point = type("Point", (), {"opt_state": state})()
    torch.testing.assert_close(Shared(0.3).inverse(Operator(lambda u: 2 * u, like=r, point=point))(r), r / 2)


# The contenders


@pytest.mark.parametrize("contender", HERE, ids=lambda one: one.name)
def test_each_comes_to_the_truth(contender: Contender, course: Course) -> None:
    """With many steps and the finest solve, in float32: what is left is rounding times the condition, 1e-7 · 30."""
    finest = LINEAR[contender.linear][-1]
    done = worker.measure(contender, SMOKE.problem(seed=0), course, SMOKE, Knobs(60, finest), strict=False)
    assert max(done.errors) < 1e-4
    assert len(done.seconds) == len(done.processor) == SMOKE.outer
    assert done.stopped is None


def test_the_tuned_knobs_will_do_and_coarser_ones_do_not(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "STEPS", (3, 10, 60))
    monkeypatch.setattr(worker, "LINEAR", {"products": (5, 40)})
    problem, one = SMOKE.problem(seed=0), CONTENDERS["by-hand"]
    knobs, why = worker.tune(one, problem, course, SMOKE)
    assert knobs is not None
    assert why is None
    held = worker.measure(one, problem, course, SMOKE, knobs, strict=True)
    assert held.stopped is None
    assert max(held.errors[SMOKE.free :]) <= SMOKE.tolerance
    coarser = replace(knobs, steps=3)
    stopped = worker.measure(one, problem, course, SMOKE, coarser, strict=True).stopped
    assert stopped is not None
    assert stopped.startswith("error")
    assert worker.measure(one, problem, course, replace(SMOKE, limit=0.0), knobs, strict=True).stopped == (
        f"over 0 s at outer step 0 of {SMOKE.outer}"
    )


def test_who_cannot_says_why(course: Course) -> None:
    knobs, why = worker.tune(CONTENDERS["by-hand"], SMOKE.problem(seed=0), course, replace(SMOKE, limit=0.0))
    assert knobs is None
    assert why == f"over 0 s at outer step 0 of {SMOKE.outer}"


def test_the_ratio_is_to_the_fastest_torch_peer() -> None:
    times = {"by-hand": 3.0, "torchopt-cg": 2.0, "jax-jit": 0.1, "funcmlo": 0.5, "by-hand-lbfgs": 1.0}
    rows = [Outcome(name, 0, "", processor=[t, 9 * t, t]) for name, t in times.items()]
    assert fastest_peer(rows) == 2.0
    assert fastest_peer(rows[2:]) is None


# The command line


def test_the_command_line_writes_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(settings: Any, seed: int, course: Path, contender: str, knobs: Any) -> dict[str, Any]:
        asked.append(contender)
        return worker.work({
            "contender": contender, "settings": asdict(settings), "seed": seed, "course": str(course), "knobs": knobs
        })  # fmt: skip

    asked: list[str] = []
    monkeypatch.setattr(worker, "STEPS", (10, 60))
    monkeypatch.setattr(worker, "LINEAR", {"products": (5, 40), "tolerance": (1e-2, 1e-4)})
    monkeypatch.setattr(running, "ask", here)
    monkeypatch.setattr(running, "version", lambda name: None if name == "higher-itd" else "1")
    chosen = ["by-hand", "higher-itd", "funcmlo"]
    words = [
        "run",
        "peers-accuracy",
        "--preset",
        "smoke",
        "--out",
        str(tmp_path),
        "--set",
        "repeats=2",
        "--methods",
        *chosen,
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert asked == ["by-hand", "funcmlo", "by-hand", "funcmlo", "funcmlo", "by-hand"]  # tuned, then forth and back
    assert "higher-itd: not installed." in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"] == asdict(replace(SMOKE, repeats=2))
    for outcome in results["outcomes"]:
        assert len(outcome["seconds"]) == (0 if outcome["contender"] == "higher-itd" else 2)
        assert len(outcome["steps"]) == len(outcome["errors"])
    assert (tmp_path / "table.txt").read_text() in printed
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_its_own_answers(tmp_path: Path, course: Course) -> None:
    path = course.save(tmp_path / "course.pt")
    found = running.ask(SMOKE, 0, path, "by-hand", {"steps": 60, "linear": 40})
    assert max(found["errors"]) < 1e-4


def test_a_process_that_fails_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"contender": "by-hand", "settings": asdict(SMOKE), "seed": 0, "course": "nowhere.pt"}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task)))
    worker.main()
    assert json.loads(capsys.readouterr().out)["failed"].startswith("FileNotFoundError")
