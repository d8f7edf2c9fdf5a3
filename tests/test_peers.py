"""The comparison with peer libraries: its answers, its verdicts, its command line, and what explains the findings."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from funcmlo.testing import Quadratic
from paper_repro import peers_correctness
from paper_repro.cli import main
from paper_repro.peers_correctness import by_hand, networks, quadratics
from paper_repro.peers_correctness.judge import Outcome, judge, judge_peer, relative, together
from paper_repro.peers_correctness.methods import PEERS, Method, Peer
from paper_repro.peers_correctness.problem import Question
from paper_repro.peers_correctness.reference import answer, flat, parts, unrolled
from paper_repro.peers_correctness.report import cell, details, notes, summary, worst
from paper_repro.peers_correctness.run import PRESETS, questions
from tests.oracles import assert_agrees, finite_difference

RECORDED = Path(peers_correctness.__file__).parent / "recorded"
SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def asked() -> dict[str, Question]:
    return {question.name: question for question in questions(SMOKE, seed=0)}


# The answers


def test_the_dense_answer_is_the_closed_form(asked: dict[str, Question]) -> None:
    y = {"y": torch.zeros(6, dtype=torch.float64)}
    known = Quadratic(seed=0, condition=3.0, y_like=y, x_like=torch.zeros(4, dtype=torch.float64))
    assert relative(answer(asked["quadratic"], "implicit"), known.hypergradient()) < 1e-14


@pytest.mark.parametrize("name", ["quadratic", "H = 2I", "blocks", "logistic"])
def test_the_dense_answer_is_the_slope_of_the_solved_problem(name: str, asked: dict[str, Question]) -> None:
    """f(x, y*(x)) by finite differences, y* found anew by Newton's steps from the solution at x."""
    question = asked[name]
    assert question.solution is not None

    def value(x: object) -> Tensor:
        at = replace(question, x=x)
        y = flat(question.solution)
        for _ in range(3):
            _, _, hessian, _ = parts(at, y)
            slope = torch.func.grad(lambda p: question.inner(by_hand.like(p, question.start), x))(y)
            y = y - torch.linalg.solve(hessian, slope)
        return question.outer(x, by_hand.like(y, question.start))

    reference, error = finite_difference(value, question.x)
    assert_agrees(answer(question, "implicit"), reference, error, relative=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_the_differentiated_loop_is_the_slope_of_torchs_own_optimizer(name: str, asked: dict[str, Question]) -> None:
    question = asked[name]

    def value(x: object) -> Tensor:
        at = replace(question, x=x)
        return question.outer(x, {key: p.detach() for key, p in by_hand.solution(at).items()})

    reference, error = finite_difference(value, question.x)
    assert_agrees(unrolled(question), reference, error, relative=1e-6)


def test_the_questions_are_what_their_names_say(asked: dict[str, Question]) -> None:
    for question in asked.values():
        if question.solution is not None and question.name != "convnet":
            slope = torch.func.grad(lambda y, q=question: q.inner(y, q.x))(question.solution)
            assert flat(slope).norm() < 1e-6 * max(question.curvature, 1e-6), question.name
    _, _, hessian, _ = parts(asked["H = 2I"], flat(asked["H = 2I"].start))
    assert torch.allclose(hessian, 2 * torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    values = torch.linalg.eigvalsh(parts(asked["cond. 10"], flat(asked["cond. 10"].start))[2])
    assert float(values[-1] / values[0]) == pytest.approx(10)
    assert flat(asked["far start"].start).norm() == 0
    assert asked["small H"].x.dtype == torch.float32
    assert torch.isnan(asked["NaN"].outer(asked["NaN"].x, asked["NaN"].start))
    assert torch.isfinite(asked["NaN slope"].outer(asked["NaN slope"].x, asked["NaN slope"].start))
    assert torch.isnan(parts(asked["NaN slope"], flat(asked["NaN slope"].start))[1]).all()


# Everyone who is here


def judged(peer: str, method: Method, asked: dict[str, Question]) -> dict[str, Outcome]:
    return {name: judge(peer, method, question, 0) for name, question in asked.items()}


@pytest.mark.parametrize("peer", ["by-hand", "funcmlo"])
def test_this_library_and_the_hand_written_methods_are_right_on_everything(peer: str, asked: dict[str, Question]) -> None:
    outcomes = judge_peer(PEERS[peer], list(asked.values()), seed=0)
    assert len(outcomes) == len(PEERS[peer].methods()) * len(asked)
    for outcome in outcomes:
        allowed = {"right", "right to its approximation", "not asked"} | ({"not offered"} if peer == "by-hand" else set())
        assert outcome.verdict in allowed, outcome


def absent(peer: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(PEERS[peer].version() is None, reason=f"{PEERS[peer].distribution} is not installed")


# What `recorded/` has every method right on holds wherever the peer is installed in the same version; see the README.
WORKING = [
    pytest.param("higher", "innerloop_ctx", marks=absent("higher")),
    pytest.param("torchopt", "MetaSGD, MetaAdam", marks=absent("torchopt")),
    pytest.param("torchopt", "custom_root, solve_inv(ns)", marks=absent("torchopt")),
    pytest.param("betty", "neumann", marks=absent("betty")),
    pytest.param("betty", "darts, darts_alpha=1e-4", marks=absent("betty")),
]


@pytest.mark.parametrize(("peer", "method"), WORKING)
def test_a_peer_that_is_right_is_found_right(peer: str, method: str, asked: dict[str, Question]) -> None:
    for outcome in judged(peer, named(peer, method), asked).values():
        assert outcome.verdict in {"right", "right to its approximation", "not asked"}, outcome


def named(peer: str, method: str) -> Method:
    return next(m for m in PEERS[peer].methods() if m.name == method)


# What explains the findings: a hand-written copy of each fault gives the peer's own numbers


def faulty_cg(a: Tensor, v: Tensor, products: int, *, stale: bool = False, scale: float = 1.0) -> Tensor:
    """Conjugate gradient whose direction takes the residual before its update, or whose step alone is scaled."""
    w, r, p = torch.zeros_like(v), v, v
    for _ in range(products):
        length = (r @ r) / (scale * (a @ p) @ p)
        w, new = w + length * p, r - length * (a @ p)
        p, r = (r if stale else new) + (new @ new) / (r @ r) * p, new
    return scale * w


def late_cg(a: Tensor, v: Tensor, products: int, tolerance: float) -> Tensor:
    """Conjugate gradient that returns the iterate before the one whose residual is small."""
    w, r, p = torch.zeros_like(v), v, v
    for _ in range(products):
        length = (r @ r) / (p @ a @ p)
        following, new = w + length * p, r - length * (a @ p)
        if new.norm() < tolerance:
            break
        w, p, r = following, new + (new @ new) / (r @ r) * p, new
    return w


def blocks_only(question: Question, a: Tensor, v: Tensor) -> Tensor:
    sizes = [p.numel() for p in question.start.values()]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    pairs = pairwise(ends)
    return torch.cat([torch.linalg.solve(a[i:j, i:j], v[i:j]) for i, j in pairs])


def expected(question: Question, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    direct, v, hessian, cross = parts(question, flat(question.solution))
    return direct - cross.T @ solve(hessian, v)


@absent("betty")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "scale"), [("cg", 1.0), ("cg, cg_alpha=0.1", 0.1)])
def test_betty_cg_takes_the_residual_before_its_update(method: str, scale: float, asked: dict[str, Question]) -> None:
    question = asked["quadratic"]
    given = named("betty", method).call(question)
    explained = expected(question, lambda a, v: faulty_cg(a, v, question.size, stale=True, scale=scale))
    assert relative(given, explained) < 1e-9
    assert relative(given, expected(question, lambda a, v: faulty_cg(a, v, question.size))) > 0.1


@absent("boat")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["quadratic", "H = 2I"])
def test_boat_cg_returns_the_iterate_before_the_converged_one(name: str, asked: dict[str, Question]) -> None:
    question = asked[name]
    rate = question.rate
    explained = expected(question, lambda a, v: rate * late_cg(rate * a, v, 4 * question.size, 1e-10))
    given = named("boat", "CG").call(question)
    assert relative(given, explained) < 1e-9
    assert relative(given, answer(question, "implicit")) > 1e-4
    if name == "H = 2I":
        assert torch.equal(given, parts(question, flat(question.start))[0])  # the direct gradient alone


@absent("boat")
@pytest.mark.filterwarnings("ignore")
def test_boat_fd_takes_the_cross_term_at_the_start(asked: dict[str, Question]) -> None:
    question = asked["far start"]
    direct, v, _, _ = parts(question, flat(question.solution))
    _, _, _, cross = parts(question, flat(question.start))
    given = named("boat", "FD").call(question)
    assert relative(given, direct - question.rate * cross.T @ v) < 1e-3  # a difference of length 0.01
    assert relative(given, answer(question, "one step")) > 0.1


@absent("boat")
@pytest.mark.filterwarnings("ignore")
def test_boat_rgt_leaves_the_lower_losss_gradients_in_the_upper_ones(asked: dict[str, Question]) -> None:
    question = asked["quadratic"]
    slope = torch.func.grad(lambda x: question.inner(question.start, x))(question.x)
    left = (question.steps // 10) * slope  # one for each step that is not differentiated, all at the solution
    given = named("boat", "RGT, RAD").call(question)
    assert relative(given - left, answer(question, "implicit")) < 1e-6


@absent("boat")
@pytest.mark.filterwarnings("ignore")
def test_boat_turns_nan_into_zero(asked: dict[str, Question]) -> None:
    assert named("boat", "RAD").call(asked["NaN"]).abs().max() == 0


@absent("torchopt")
@pytest.mark.filterwarnings("ignore")  # torchopt uses functorch's old names
def test_torchopt_cg_does_not_start_on_nan(asked: dict[str, Question]) -> None:
    question = asked["NaN"]
    given = named("torchopt", "custom_root, solve_cg").call(question)
    assert torch.equal(given, 2 * question.x)  # the direct gradient alone


@absent("torchopt")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["blocks", "net"])
def test_torchopt_inv_keeps_only_the_blocks_on_the_diagonal(name: str, asked: dict[str, Question]) -> None:
    question = asked[name]
    given = named("torchopt", "custom_root, solve_inv").call(question)
    assert relative(given, expected(question, lambda a, v: blocks_only(question, a, v))) < 1e-9
    assert relative(given, answer(question, "implicit")) > 0.01


# Verdicts, on planted adapters


def planted(question: Question, change: Callable[[Tensor], Tensor], target: str = "implicit", **fields: object) -> Outcome:
    method = Method("planted", target, lambda q: change(answer(q, target)), **fields)
    return judge("peer", method, question, 0)


def test_verdicts(asked: dict[str, Question]) -> None:
    question = asked["quadratic"]
    assert planted(question, lambda g: g).verdict == "right"
    assert planted(question, lambda g: g * (1 + 2e-6)).verdict == "wrong"
    assert planted(question, lambda g: g * (1 + 2e-6)).error == pytest.approx(2e-6)
    assert planted(question, lambda g: g[:2]).verdict == "wrong"
    assert planted(question, lambda g: g * float("nan")).message == "not finite"
    assert planted(question, lambda g: g * 1.005, "identity", difference=True).verdict == "right to its approximation"
    assert planted(question, lambda g: g * 1.02, "identity", difference=True).verdict == "wrong"
    assert planted(question, lambda g: g * 1.005, "identity").verdict == "wrong"
    assert planted(question, lambda g: g, suits=lambda q: False).verdict == "not asked"
    assert planted(asked["sgd"], lambda g: g).verdict == "not asked"
    assert planted(asked["small H, rate 1"], lambda g: g, uses_rate=True).verdict == "not asked"
    assert planted(asked["momentum"], lambda g: g, "unrolled", optimizers=frozenset({"sgd"})).verdict == "not offered"

    def broken(gradient: Tensor) -> Tensor:
        raise KeyError("params")

    assert planted(question, broken).verdict == "error"
    assert planted(question, broken).message == "KeyError: 'params'"


@pytest.mark.parametrize("name", ["NaN", "NaN slope"])
def test_where_there_is_no_answer_a_number_is_wrong(name: str, asked: dict[str, Question]) -> None:
    question = asked[name]
    assert planted(question, lambda g: g).verdict == "right"
    assert planted(question, lambda g: torch.full_like(g, float("inf"))).verdict == "right"
    assert planted(question, torch.zeros_like).verdict == "wrong"
    assert planted(question, torch.nan_to_num).verdict == "wrong"


def test_an_adapter_that_raises_everywhere_earns_nothing(asked: dict[str, Question]) -> None:
    def broken(question: Question) -> Tensor:
        raise RuntimeError("no")

    peer = SimpleNamespace(name="peer", version=lambda: "1", methods=lambda: [Method("m", "implicit", broken)])
    outcomes = judge_peer(peer, list(asked.values()), 0)
    assert {o.verdict for o in outcomes} == {"error", "not asked"}
    raised = Outcome("p", "m", "implicit", "NaN", 0, "right", message="ValueError: NaN")
    good = Outcome("p", "m", "implicit", "quadratic", 0, "right", 1e-12, 1e-6)
    assert together([good, raised])[1].verdict == "right"
    assert together([raised])[0].verdict == "error"


def test_peers_that_are_absent_or_do_not_import_are_said_to_be() -> None:
    [missing] = judge_peer(Peer("x", "no-such-distribution-of-that-name", "by_hand"), [], 0)
    assert missing.verdict == "not installed"
    [failing] = judge_peer(Peer("z", "torch", "no_such_adapter"), [], 0)
    assert failing.verdict == "error"
    assert "does not import with torch 2" in (failing.message or "")
    assert "ModuleNotFoundError" in (failing.message or "")
    text = summary([missing, failing], {"x": None})
    assert "pip has no no-such-distribution" in text


# The tables


def outcome(verdict: str, error: float | None = None, seed: int = 0, message: str | None = None) -> Outcome:
    return Outcome("peer", "m", "implicit", "quadratic", seed, verdict, error, 1e-6, message)


def test_cells() -> None:
    assert cell(outcome("right", 1.4e-15)) == "1e-15"
    assert cell(outcome("right to its approximation", 3e-5)) == "~3e-05"
    assert cell(outcome("wrong", 0.44)) == "4e-01!"
    assert cell(outcome("wrong", float("inf"), message="not finite")) == "not finite!"
    assert cell(outcome("wrong", message="finite")) == "finite!"
    assert cell(outcome("right", message="ValueError: NaN")) == "raised"
    assert cell(outcome("right", message="not finite")) == "not finite"
    assert cell(outcome("error", message="KeyError: 'params'")) == "ERROR"
    assert [cell(outcome(v)) for v in ("not asked", "not offered", "not installed")] == ["–", "n/o", "absent"]


def test_the_worst_seed_counts() -> None:
    right, wrong = outcome("right", 1e-9), outcome("wrong", 0.1, seed=1)
    assert worst([right, wrong]) is wrong
    assert worst([wrong, outcome("wrong", 0.3, seed=2)]).error == 0.3
    assert worst([right, outcome("right", 1e-8)]).error == 1e-8
    assert "0 of 1" in summary([right, wrong], {"peer": "1.2"})
    assert "peer 1.2" in summary([right, wrong], {"peer": "1.2"})
    assert "quadratic (1e-01)" in summary([right, wrong], {"peer": "1.2"})
    assert "1 of 1" in summary([right], {"peer": ""})


def test_the_command_line_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "peers-correctness", "--preset", "smoke", "--methods", "by-hand", "boat", "--out", str(tmp_path)]
    assert main(words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["by-hand"] == ""
    assert {o["peer"] for o in results["outcomes"]} == {"by-hand", "boat"}
    text = (tmp_path / "table.txt").read_text()
    assert text in capsys.readouterr().out
    assert all(f"\n{question.name} " in text for question in questions(SMOKE, 0))


def test_the_recorded_table_is_made_of_the_recorded_results() -> None:
    results = json.loads((RECORDED / "results.json").read_text())
    outcomes = [Outcome(**{**o, "error": None if o["error"] is None else float(o["error"])}) for o in results["outcomes"]]
    asked = questions(PRESETS[results["preset"]], seed=0)
    made = "\n\n".join([summary(outcomes, results["versions"]), details(outcomes, asked), notes(outcomes, asked)])
    assert made + "\n" == (RECORDED / "table.txt").read_text()
    assert {o.peer for o in outcomes} == set(PEERS)
    assert not [o for o in outcomes if o.peer in {"by-hand", "funcmlo"} and o.verdict in {"wrong", "error"}]


def test_recorded_versions_are_the_pinned_ones() -> None:
    results = json.loads((RECORDED / "results.json").read_text())
    pinned = dict(
        line.split("==")
        for line in (RECORDED.parent / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for peer in ("betty", "higher", "boat"):
        assert results["versions"][peer] == pinned[str(PEERS[peer].distribution)]


def test_versions_come_from_pip() -> None:
    assert PEERS["funcmlo"].version() == importlib.metadata.version("funcmlo")
    assert PEERS["by-hand"].version() == ""


def test_the_convnet_is_trained() -> None:
    question = networks.convnet(0, 32, 20)
    fresh = networks.convnet(0, 32, 0)
    assert question.inner(question.start, question.x) < 0.5 * fresh.inner(fresh.start, fresh.x)
    assert quadratics.undefined(0).defined is False
