"""`check_estimator` passes what is right and names what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funcmlo as fm
from funcmlo import _tree
from tests.faulty import CG, COMPOSED, FAULTS, RIGHT, Neumann, Unroll
from tests.registry import ESTIMATORS

check = fm.testing.check_estimator
TOP, SIZE = 1.0, 12  # the checks' problems have eigenvalues up to 1 and at most 12 unknowns


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_estimator_of_the_library_is_failed(name: str) -> None:
    check(ESTIMATORS[name](TOP, SIZE), raise_on_failure=True)


@pytest.mark.parametrize("name", RIGHT)
def test_right_estimators_of_twenty_lines_pass(name: str) -> None:
    check(RIGHT[name](), raise_on_failure=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str) -> None:
    make, name = FAULTS[fault]
    report = check(make(), checks=[name])
    assert name in report.failures
    assert not report.passed
    with pytest.raises(fm.EstimatorError, match=name):
        report.raise_on_failure()


@pytest.mark.parametrize("fault", COMPOSED)
def test_a_fault_in_the_composition_is_named(fault: str) -> None:
    hypergradient, name = COMPOSED[fault]
    for estimator in (fm.AID(fm.CG(10)), fm.ITD(), fm.FiniteDifference()):
        assert check(estimator, checks=[name]).passed
        report = check(estimator, checks=[name], hypergradient=hypergradient)
        assert list(report.failures) == [name]
        assert "it is that without ∇_x f" in report[name].message or "is in it twice" in report[name].message


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("a transposed cross term", "the transpose"),
        ("a damping applied twice", r"it gave \(H \+ 0\.6I\)"),
        ("the iterate before the converged one", "the iterate before the converged one came back"),
        ("diagonal blocks alone", "diagonal blocks alone"),
        ("a cross term at the start", "at the loop's start"),
        ("an off-by-one in the unroll", "it is that of 4"),
        ("a dropped optimizer state", "was dropped"),
        ("a sample not averaged", "the samples are summed"),
        ("an input changed in place", "the cotangent"),
    ],
)
def test_the_message_says_what_the_answer_is_instead(fault: str, told: str) -> None:
    make, name = FAULTS[fault]
    with pytest.raises(fm.EstimatorError, match=told):
        check(make(), checks=[name], raise_on_failure=True)


def test_faults_that_do_not_spread_fail_one_check_alone() -> None:
    for fault in ("a damping applied twice", "an input changed in place", "NaN turned into zero", "a state that leaks"):
        make, name = FAULTS[fault]
        assert list(check(make()).failures) == [name]


@pytest.mark.slow
def test_two_hundred_seeded_runs_fail_no_right_estimator() -> None:
    names = [*ESTIMATORS, *RIGHT]
    makes: dict[str, Callable[[], fm.BestResponse]] = {n: lambda n=n: ESTIMATORS[n](TOP, SIZE) for n in ESTIMATORS} | RIGHT
    failed = {}
    for run in range(200):
        name = names[run % len(names)]
        report = check(makes[name](), seed=1 + run)
        if not report.passed:
            failed[name, 1 + run] = list(report.failures)
    assert failed == {}


@pytest.mark.parametrize("rate", [3.0, 1e-4])
def test_a_knob_that_leads_nowhere_is_named_and_soon(rate: float) -> None:
    class Elsewhere(Neumann):
        def solve(self, solved: fm.Solved, v: Any) -> tuple[Any, float]:
            w, residual = super().solve(solved, v)
            return _tree.scale(self.rate, w), residual

    Elsewhere.rate = rate
    start = time.process_time()
    report = check(Elsewhere(), checks=["knob_without_limit"])
    assert "diverges, or is too slow to be judged" in report.failures["knob_without_limit"].message
    assert time.process_time() - start < 30
    Elsewhere.rate = 1.0
    assert check(Elsewhere()).passed


def test_it_takes_less_than_a_minute() -> None:
    start = time.process_time()
    assert check(CG()).passed
    assert time.process_time() - start < 60


def test_the_report_prints_and_renders() -> None:
    report = check(FAULTS["a wrong sign"][0]())
    text = str(report)
    assert text.splitlines()[0].startswith("WrongSign(): ")
    assert text.splitlines()[1].startswith("  failed  sign")
    assert "−∇²_xy g carries a minus sign" in text
    assert "<table>" in report._repr_html_()
    assert "WrongSign" in repr(report)
    assert report["sign"].status == "failed"
    assert report["sign"] == report.failures["sign"]
    assert {outcome.status for outcome in report} == {"passed", "failed", "skipped"}
    assert "steps_counted" in report.skipped
    with pytest.raises(KeyError, match="'signs' is no check; there are sign"):
        report["signs"]


@fm.testing.parametrize_with_checks([fm.AID(fm.CG(20)), fm.ITD(), CG(), Unroll()])
def test_suites_get_one_test_for_each_check(estimator: fm.BestResponse, check: Callable[[fm.BestResponse], None]) -> None:
    check(estimator)


def test_a_suite_fails_where_the_estimator_does() -> None:
    mark = fm.testing.parametrize_with_checks([FAULTS["a wrong sign"][0]()]).mark
    assert mark.args[0] == ("estimator", "check")
    cases = {case.id: case.values for case in mark.args[1]}
    estimator, one = cases["WrongSign()-sign"]
    with pytest.raises(fm.EstimatorError, match=r"WrongSign.* 0 checks passed, 1 failed"):
        one(estimator)
    with pytest.raises(pytest.skip.Exception, match="its target is the implicit derivative"):
        cases["WrongSign()-steps_counted"][1](estimator)


class NoKnob(CG):
    claims = fm.Claims(knob="iters")


def test_one_sample_of_signs_is_no_repeated_draw() -> None:
    for seed in range(10):
        assert check(fm.ForwardGradient(1), checks=["draws_repeated", "biased"], seed=seed).passed


def test_the_caller_s_modes_do_not_matter() -> None:
    dtype = torch.get_default_dtype()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert check(fm.OneStep()).passed
    assert check(FAULTS["grad mode left off"][0](), checks=["global_settings_changed"]).failures
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == (True, dtype)


def test_a_refusal_is_no_pass() -> None:
    outcome = check(fm.PerturbedSolve(3), checks=["learning_rate_missing", "sign"])["learning_rate_missing"]
    assert outcome.status == "skipped"
    assert "it refuses a learned rate" in outcome.message
    assert "chunk=1" in outcome.message
    assert check(fm.PerturbedSolve(3, chunk=1), checks=["learning_rate_missing"]).passed


def test_ids_are_unique() -> None:
    cases = fm.testing.parametrize_with_checks([CG(), CG(), CG(damping=0.1)]).mark.args[1]
    assert len({case.id for case in cases}) == len(cases)


def test_an_exception_is_a_failure_with_its_message() -> None:
    class Raising(CG):
        def vjp(self, solved: fm.Solved, cotangent: Any, state: Any) -> Any:
            raise ValueError("no answer today")

    report = check(Raising())
    assert "ValueError: no answer today" in report["sign"].message
    assert not report.passed


def test_an_answer_that_is_not_a_number_fails() -> None:
    class NotANumber(CG):
        def cross(self, solved: fm.Solved, w: Any) -> Any:
            return _tree.scale(torch.nan, solved.inputs)

    assert {"sign", "scale", "inverse_hessian"} <= set(check(NotANumber()).failures)


def test_estimators_of_one_level_need_a_problem_of_theirs() -> None:
    problem = fm.testing.Quadratic(condition=3.0)
    factor = torch.linalg.cholesky(problem.a).T
    curvature = fm.GaussNewton(lambda y: factor @ y, lambda f: (f**2).sum() / 2)
    own = fm.AID(fm.CG(8), curvature=curvature)
    with pytest.raises(fm.EstimatorError, match=r"no check applies to AID\(.*a level of its own alone: hand in problems="):
        check(own)
    report = check(own, problems=[problem])
    assert report["known_Quadratic"].status == "passed"
    wrong = fm.AID(fm.CG(8), curvature=fm.GaussNewton(lambda y: 2 * factor @ y, lambda f: (f**2).sum() / 2))
    assert "known_Quadratic" in check(wrong, problems=[problem]).failures


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: check(CG), r"the class CG came; expected an instance of it: CG\(…\)"),
        (lambda: check("cg"), "str came; expected an estimator, an instance of a subclass of fm.BestResponse"),
        (lambda: check(CG(), checks=["sine"]), "'sine' is no check; did you mean 'sign'"),
        (lambda: check(CG(), checks=[]), "checks= is empty; leave it out for all"),
        (lambda: check(CG(), problems=fm.testing.Ridge()), r"expected a list: problems=\[Ridge"),
        (lambda: fm.Claims(target="implict"), "Claims.target='implict'.; did you mean 'implicit'"),
        (lambda: fm.Claims(assumes="minimization"), "expected a set of some of 'minimization'"),
        (lambda: fm.Claims(assumes=frozenset({"posdef"})), "expected a set of some of 'minimization'"),
        (lambda: check(NoKnob()), "claims the knob 'iters', and has no such field"),
        (lambda: check(CG(), problems=[1]), "problems=int; expected instances of fm.testing.Known"),
        (lambda: fm.testing.parametrize_with_checks([CG]), "the class CG came"),
    ],
)
def test_wrong_use_is_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(fm.DefinitionError, match=message):
        wrong()
