"""Estimators side by side: errors against closed forms, costs against counts, and what the report says."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
import torch.nn.functional as F
import torchopt

import funcmlo as fm
from funcmlo import _tree, table
from funcmlo._compare import compare
from funcmlo.comparing.comparison import Comparison
from funcmlo.comparing.measuring import Row
from funcmlo.comparing.peak_memory import peak_memory
from tests.hierarchies import Hierarchy

mpl.use("Agg")

FAST = {"repeats": 1, "samples": 2}
N = 5
PROBLEM = fm.testing.Quadratic(
    seed=3, condition=10.0, y_like=torch.zeros(8, dtype=torch.float64), x_like=torch.zeros(N, dtype=torch.float64)
)
ROUNDING = 1e-11  # a few hundred operations times the condition number


def implicit(y: torch.Tensor, inverse: torch.Tensor | None = None) -> torch.Tensor:
    """Return x + Bᵀ H⁻¹ cos y, the hypergradient of PROBLEM at a point y."""
    w = torch.linalg.solve(PROBLEM.a, torch.cos(y)) if inverse is None else inverse @ torch.cos(y)
    return PROBLEM.x + PROBLEM.b.T @ w


def descended(steps: int) -> torch.Tensor:
    """Where gradient descent of rate 1 is after some steps from the start."""
    y = PROBLEM.start
    for _ in range(steps):
        y = y - (PROBLEM.a @ y - PROBLEM.b @ PROBLEM.x)
    return y


def against_problem(estimators: object, steps: int = 0, **settings: object) -> Comparison:
    """Compare on PROBLEM: from its start, or with the solution where it stands."""
    program = PROBLEM.program(fm.FiniteDifference(), steps=steps)
    return compare(estimators, program, PROBLEM.state(program, solved=not steps), {}, **{**FAST, **settings})


def far(a: torch.Tensor, r: torch.Tensor) -> float:
    return float((a - r).norm() / r.norm())


def test_errors_are_those_of_the_closed_forms() -> None:
    y, eye = PROBLEM.solution(), torch.eye(8, dtype=torch.float64)
    r = implicit(y)
    series = sum((torch.linalg.matrix_power(eye - 0.5 * PROBLEM.a, k) for k in range(4)), torch.zeros_like(eye)) * 0.5
    found = against_problem({
        "exact": fm.AID(fm.CG(20)),
        "damped": fm.AID(fm.Direct(), curvature=fm.Damped(0.3)),
        "series": fm.AID(fm.Neumann(3, scale=0.5)),
        "identity": fm.AID(fm.Identity()),
    })
    torch.testing.assert_close(found.reference.gradient, r, rtol=ROUNDING, atol=0)
    assert found.reference.error is not None
    assert found.reference.error < ROUNDING
    assert found["exact"].error < ROUNDING
    for name, inverse in (("damped", torch.linalg.inv(PROBLEM.a + 0.3 * eye)), ("series", series), ("identity", eye)):
        a = implicit(y, inverse)
        assert found[name].error == pytest.approx(far(a, r), rel=1e-9), name
        assert found[name].cosine == pytest.approx(float(F.cosine_similarity(a, r, dim=0)), rel=1e-9), name
        torch.testing.assert_close(found[name].gradient, a)
    assert (found["series"].hvps, found["series"].iterations) == (3, 3)
    assert found["exact"].bias is None


def test_all_are_compared_at_the_solution_that_was_reached() -> None:
    found = against_problem([fm.AID(fm.Direct()), fm.ITD()], steps=7)
    torch.testing.assert_close(found.reference.gradient, implicit(descended(7)), rtol=ROUNDING, atol=0)
    assert found["AID(Direct())"].error < ROUNDING
    assert found["ITD()"].error > 1e-3
    assert found["ITD()"].steps == 7
    unrolled = against_problem([fm.AID(fm.Direct()), fm.ITD()], steps=7, reference="unrolled")
    eye = torch.eye(8, dtype=torch.float64)
    run = sum((torch.linalg.matrix_power(eye - PROBLEM.a, k) for k in range(7)), torch.zeros_like(eye))
    torch.testing.assert_close(unrolled.reference.gradient, implicit(descended(7), run), rtol=ROUNDING, atol=0)
    assert unrolled["ITD()"].error < ROUNDING < unrolled["AID(Direct())"].error
    assert 0 <= unrolled.reference.error < ROUNDING


def test_an_unsolved_inner_problem_is_told() -> None:
    found = against_problem([fm.AID(fm.Direct())], steps=7)
    assert found.reference.moves == pytest.approx(far(implicit(descended(14)), implicit(descended(7))), rel=1e-9)
    slope = [PROBLEM.a @ y - PROBLEM.b @ PROBLEM.x for y in (descended(0), descended(7))]
    assert found.inner["y"].stationarity == pytest.approx(float(slope[1].norm()), rel=1e-12)
    assert found.inner["y"].relative == pytest.approx(float(slope[1].norm() / slope[0].norm()), rel=1e-12)
    assert "The inner problem is not solved" in str(found)
    # (1 − 1/condition)^250 is 4e-12: told, but not as unsolved.
    solved = against_problem([fm.AID(fm.Direct())], steps=250)
    assert solved.reference.moves < 1e-9
    assert "not solved" not in str(solved)
    # Where no steps were made, none can be added.
    assert against_problem([fm.AID(fm.Direct())]).reference.moves is None


def test_steps_that_cannot_be_added_are_no_error() -> None:
    batches = [torch.full((8,), float(t), dtype=torch.float64) for t in range(3)]
    program = fm.Multilevel(
        fm.Level("y", lambda y, x, batch: ((y - x - batch) ** 2).sum() / 2, torchopt.sgd(0.5), steps=3),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(8).double(), "x": torch.ones(8).double()})
    found = compare([fm.AID(fm.CG(3))], program, state, {"y": batches.__getitem__}, **FAST)
    assert found.reference.moves is None
    assert "longer inner loops failed (list index out of range)" in str(found)


# --- stochastic estimators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "factor"),
    [(fm.ForwardGradient(4), N - 1), (fm.PerturbedSolve(4, scale=0.1), N + 1)],
    ids=["forward gradient", "perturbed solve"],
)
def test_bias_and_variance_are_those_of_the_formulas(estimator: fm.BestResponse, factor: int) -> None:
    draws = 150
    found = against_problem({"it": estimator}, steps=2, reference="unrolled", samples=draws)
    row, r = found["it"], found.reference.gradient
    a = r - PROBLEM.x  # the upper cost's direct gradient is not drawn
    variance = factor / 4 * float(a @ a) / float(r @ r)
    # ‖answer − a‖² is a mean over 4 signs or normals in N directions: its own relative deviation is below 1.
    assert row.variance == pytest.approx(variance, rel=4 / draws**0.5)
    assert row.error**2 == pytest.approx(variance, rel=4 / draws**0.5)
    assert row.bias_error == pytest.approx((row.variance / draws) ** 0.5, rel=1e-12)
    # A mean of 150 in N = 5 dimensions: its square is χ²(5)/5 of its expectation, below 5 but for one time in 10⁴.
    assert row.bias < 5**0.5 * row.bias_error
    assert row.samples == draws


def test_a_biased_stochastic_estimator_shows_its_bias() -> None:
    # Against the implicit hypergradient the run of two steps is off by what ITD is off.
    found = against_problem([fm.ITD(), fm.ForwardGradient(400)], steps=2, samples=8)
    row, bias = found["ForwardGradient(400)"], found["ITD()"].error
    assert abs(row.bias - bias) < 5 * row.bias_error < bias
    assert row.error**2 == pytest.approx(row.bias**2 + row.variance * 7 / 8, rel=1e-9)


def moving(t: int) -> torch.Tensor:
    return torch.linspace(-1, 2, 4).double() + (0.7 * t) % 1.3


def sequence() -> tuple[fm.Multilevel, fm.State]:
    """Take g = ½‖y‖² − ⟨y, batch ∘ x⟩, so that one fresh batch answers batch ∘ v."""
    program = fm.Multilevel(
        fm.Level("y", lambda y, x, batch: (y**2).sum() / 2 - (y * batch * x).sum(), torchopt.sgd(0.5), steps=3),
        fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
    )
    return program, program.init({"y": torch.zeros(4).double(), "x": torch.ones(4).double()})


def test_each_draw_takes_its_own_batches_and_nothing_else_changes() -> None:
    program, state = sequence()
    asked: list[int] = []

    def source(t: int) -> torch.Tensor:
        asked.append(t)
        return moving(t)

    estimator = fm.AID(fm.Identity(), curvature=fm.Resampled())
    r = moving(2)
    row = compare({"it": estimator}, program, state, {"y": source}, reference=r, repeats=1, samples=5)["it"]
    draws = torch.stack([moving(3 + i) for i in range(5)])  # three inner steps took the batches 0, 1, 2
    assert set(asked) == set(range(8))
    torch.testing.assert_close(row.gradient, draws[0])
    assert row.bias == pytest.approx(far(draws.mean(0), r), rel=1e-12)
    assert row.variance == pytest.approx(float(draws.var(0).sum() / (r @ r)), rel=1e-12)
    assert row.error == pytest.approx(float(((draws - r) ** 2).sum(1).mean().sqrt() / r.norm()), rel=1e-12)
    assert not row.notes


def test_draws_that_are_all_the_same_or_missing_are_told() -> None:
    program, state = sequence()
    estimator = {"it": fm.AID(fm.Identity(), curvature=fm.Resampled())}
    fixed = compare(estimator, program, state, {"y": moving(0)}, **FAST)["it"]
    assert fixed.variance == 0
    assert "all the same one" in fixed.notes[0]
    few = compare(estimator, program, state, {"y": [moving(t) for t in range(6)].__getitem__}, repeats=1, samples=9)["it"]
    assert few.samples == 3
    assert "only 3 of 9 draws" in few.notes[0]


# --- the reference -----------------------------------------------------------------------------------------------


def test_a_float32_program_is_held_against_float64() -> None:
    program = PROBLEM.program(fm.FiniteDifference(), steps=7)
    state = program.init({"y": PROBLEM.start.float(), "x": PROBLEM.x.float()})
    found = compare([fm.AID(fm.Direct())], program, state, {}, **FAST)
    assert found.reference.gradient.dtype == torch.float64
    solved = program.step(state, {})[0].params["y"].double()
    w = torch.linalg.solve(PROBLEM.a, torch.cos(solved))
    expected = PROBLEM.x.float().double() + PROBLEM.b.T @ w
    torch.testing.assert_close(found.reference.gradient, expected, rtol=ROUNDING, atol=0)
    assert found.reference.error < ROUNDING
    # The row is float32's: rounding times the condition number, and no better.
    assert 1e-9 < found["AID(Direct())"].error < 1e-4


@pytest.mark.parametrize("kind", ["closure", "dropout"])
def test_losses_that_do_not_bear_float64_are_told(kind: str) -> None:
    matrix = torch.eye(6) + 0.1

    def closure(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y @ (matrix @ y) / 2 - (x * y).sum()

    def dropout(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scattered = torch.rand(6, dtype=y.dtype)  # another draw in another precision
        return (y**2).sum() / 2 - (x * y * scattered).sum()

    program = fm.Multilevel(
        fm.Level("y", closure if kind == "closure" else dropout, torchopt.sgd(0.5), steps=4),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.ones(6), "x": torch.ones(6)})
    found = compare([fm.AID(fm.CG(10))], program, state, {}, **FAST)
    assert found.reference.gradient.dtype == torch.float32
    assert "in float32" in found.reference.description
    expected = {"closure": "dtype", "dropout": "do they draw at random?"}[kind]
    assert "own torch.float32, because in float64" in str(found).replace("\n  ", " ")
    assert expected in str(found).replace("\n  ", " ")
    assert found["AID(CG(10))"].error < 1e-5


def test_large_levels_have_a_reference_by_products() -> None:
    curvatures = torch.linspace(1, 2, 1500, dtype=torch.float64)
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: (curvatures * y**2).sum() / 2 - (x * y).sum(), torchopt.sgd(0.5), steps=60),
        fm.Level("x", lambda x, y: torch.sin(y).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(1500).double(), "x": torch.ones(1500).double()})
    found = compare([fm.AID(fm.CG(60))], program, state, {}, **FAST)
    assert "MINRES" in found.reference.description
    assert found.reference.error < 1e-12
    torch.testing.assert_close(found.reference.gradient, torch.cos(1 / curvatures) / curvatures, rtol=1e-10, atol=0)


def test_without_a_second_derivative_the_reference_is_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=3),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(3).double(), "x": torch.ones(3).double()})

    def refuse(*_: object) -> None:
        raise RuntimeError("no second derivative")

    monkeypatch.setattr(fm.AID, "vjp", refuse)
    found = compare([fm.ITD()], program, state, {}, **FAST)
    with pytest.raises(fm.EstimatorError, match=r"no reference was found \(implicit: no second derivative"):
        compare([fm.ITD()], program, state, {}, reference="implicit", **FAST)
    assert "There is no implicit: no second derivative" in str(found)
    assert found["ITD()"].error < ROUNDING


def test_the_reference_is_solved_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from funcmlo.comparing import reference

    monkeypatch.setattr(reference, "MINRES", lambda *_, **__: fm.Identity())  # a second solver that is far off
    found = against_problem([fm.AID(fm.Direct())])
    r = implicit(PROBLEM.solution())
    off = far(implicit(PROBLEM.solution(), torch.eye(8, dtype=torch.float64)), r)
    assert found.reference.error == pytest.approx(off, rel=1e-9)
    assert "errors of its size do not tell estimators apart" in str(found)
    assert "do not tell estimators apart" not in str(against_problem([fm.AID(fm.CG(1))], reference="unrolled", steps=2))
    torch.testing.assert_close(found.reference.gradient, r, rtol=ROUNDING, atol=0)


def test_references_that_are_given() -> None:
    exact = implicit(PROBLEM.solution())
    given = against_problem([fm.AID(fm.CG(20))], reference=2 * exact)
    assert given["AID(CG(20))"].error == pytest.approx(0.5, rel=1e-9)
    assert given.reference.error is None
    estimator = against_problem([fm.AID(fm.CG(20))], reference=fm.AID(fm.Identity()))
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(estimator.reference.gradient, implicit(PROBLEM.solution(), eye))
    zero = against_problem([fm.AID(fm.CG(20))], reference=0 * exact)
    assert zero["AID(CG(20))"].error == float("inf")
    assert zero["AID(CG(20))"].cosine is None


# --- costs -------------------------------------------------------------------------------------------------------


def test_peak_memory_counts_what_is_alive() -> None:
    before = torch.zeros(1000)
    assert peak_memory(lambda: before.view(10, 100)[3:].mul_(2))[1] == 0
    assert peak_memory(lambda: before + 1)[1] == 4000
    assert peak_memory(lambda: [torch.zeros(1000) for _ in range(5)])[1] == 20_000

    def one_after_another() -> None:
        for _ in range(5):
            x = torch.zeros(1000)
            del x

    assert peak_memory(one_after_another)[1] == 4000
    # The graph of sin(sin(·)) holds the first sine; going back, a cosine and its product come and go at each.
    x = before.clone().requires_grad_()
    _, short = peak_memory(lambda: torch.autograd.grad(x.sin().sum(), x))
    _, long = peak_memory(lambda: torch.autograd.grad(x.sin().sin().sin().sin().sum(), x))
    assert long == short + 3 * 4000
    assert peak_memory(lambda: 7)[0] == 7


def test_memory_of_a_row_grows_as_the_estimator_says() -> None:
    p, memory = 4000, {}
    estimators = {"recompute": fm.ITD(memory="recompute"), "implicit": fm.AID(fm.CG(2)), "store": fm.ITD()}
    for steps in (10, 20):
        program = fm.Multilevel(
            fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), steps=steps, replay=False),
            fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        )
        state = program.init({"y": torch.zeros(p).double(), "x": torch.ones(p).double()})
        found = compare(estimators, program, state, {}, **FAST)
        memory[steps] = {row.name: row.memory for row in found}
        assert found.shared_memory < 8 * 8 * p
    grown = {name: (memory[20][name] - memory[10][name]) / (10 * 8 * p) for name in estimators}
    small = 0.01  # the costs of the steps
    assert grown["recompute"] == pytest.approx(1, abs=small)
    assert grown["implicit"] == pytest.approx(0, abs=small)
    assert grown["store"] >= 1 - small


def test_seconds_are_the_estimators_own() -> None:
    import time

    class Slow(fm.BestResponse):
        def vjp(self, solved, cotangent, state):
            time.sleep(0.05)
            return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state, {"hvps": 3}

    class SlowRun(Slow):
        requires = "replay"

    def slowly(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return ((y - x) ** 2).sum() / 2

    program = fm.Multilevel(
        fm.Level("y", slowly, torchopt.sgd(0.5), steps=4),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(3).double(), "x": torch.ones(3).double()})
    given = {**FAST, "reference": torch.ones(3).double()}
    found = compare({"slow": Slow(), "run": SlowRun(), "itd": fm.ITD(memory="recompute")}, program, state, {}, **given)
    # The loop takes 0.12 s, which must not be in what is the estimators' own.
    assert 0.05 <= found["slow"].seconds < 0.12
    assert 0.05 <= found["run"].seconds < 0.12
    assert found.shared_seconds >= 0.12
    assert 0.12 <= found["itd"].seconds < 0.24  # every step made again
    assert found["slow"].hvps == 3
    assert found["slow"].gradients is None


def test_the_recording_of_the_loop_is_the_estimators_cost() -> None:
    import time

    def recorded_slowly(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03 * (x.requires_grad or torch._C._functorch.is_gradtrackingtensor(x)))
        return ((y - x) ** 2).sum() / 2

    program = fm.Multilevel(
        fm.Level("y", recorded_slowly, torchopt.sgd(0.5), steps=4),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(3).double(), "x": torch.ones(3).double()})
    found = compare([fm.ITD()], program, state, {}, reference=torch.ones(3).double(), **FAST)
    # Four sleeps, and what one loop is faster or slower than another.
    assert 0.06 <= found["ITD()"].seconds < 0.5


# --- hierarchies -------------------------------------------------------------------------------------------------

LADDER = Hierarchy({"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b")}, seed=1)


class Seen(fm.BestResponse):
    """AID that keeps where it was asked."""

    claims = fm.Claims(exact=False)

    def __init__(self, name: str, seen: list[tuple[str, torch.Tensor]]) -> None:
        object.__setattr__(self, "told", (name, seen))

    def vjp(self, solved, cotangent, state):
        name, seen = self.told
        seen.append((name, solved.params))
        return fm.AID(fm.Identity(0.5)).vjp(solved, cotangent, state)


@pytest.mark.parametrize("composition", ["paths", "nested"])
@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_three_levels(composition: str) -> None:
    program = LADDER.program(composition, steps=1, response=fm.AID(fm.Direct()))
    levels = [replace(level, steps=3) if level.name != "c" else level for level in program.levels]
    program = fm.Multilevel(*levels, composition=composition)
    state = program.init({name: torch.ones(2).double() for name in "abc"})
    found = compare([fm.AID(fm.CG(5)), fm.AID(fm.Identity(0.5))], program, state, {}, **FAST)
    assert found.through == ("a", "b")
    exact = program.hypergradient(state, {}, of="c")
    torch.testing.assert_close(found.reference.gradient, exact, rtol=1e-9, atol=1e-12)
    assert found["AID(CG(5))"].error < 1e-9 < found["AID(Identity(scale=0.5))"].error
    assert set(found.inner) == ({"a", "b"} if composition == "paths" else set())
    of_b = compare([fm.AID(fm.CG(5))], program, state, {}, of="b", **FAST)
    assert of_b.through == ("a",)
    torch.testing.assert_close(of_b.reference.gradient, program.hypergradient(state, {}, of="b"), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_what_other_levels_see_of_a_level_stays() -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    program = LADDER.program("paths", steps=1, response=fm.AID(fm.CG(1)))
    program = fm.Multilevel(*(replace(level, steps=2) if level.name != "c" else level for level in program.levels))
    state = program.init({name: torch.ones(2).double() for name in "abc"})
    compare({name: Seen(name, seen) for name in ("one", "two")}, program, state, {}, **FAST)
    points = {float(point.sum()) for _, point in seen}
    assert len(points) == 2  # a's solution and b's, the same for both estimators
    seen.clear()
    found = compare([Seen("one", seen)], program, state, {}, through="b", **FAST)
    assert found.through == ("b",)
    assert len({float(point.sum()) for _, point in seen}) == 1


class Marked(fm.BestResponse):
    """An estimator that must be handed its own first state."""

    def init(self, params):
        return "mine"

    def vjp(self, solved, cotangent, state):
        assert state == "mine"
        return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state, fm.Stats()


@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_states_of_estimators_are_made_anew() -> None:
    program = PROBLEM.program(fm.AID(fm.CG(3), warm_start=True), steps=5)
    state, _ = program.step(PROBLEM.state(program, solved=False), {})
    warm = [fm.AID(fm.CG(20), warm_start=True), fm.AID(fm.MINRES(20), warm_start=True), fm.ITD(), Marked()]
    assert [row.reason for row in compare(warm, program, state, {}, **FAST)] == [None] * 4
    ladder = LADDER.program("paths", steps=1, response=fm.AID(fm.CG(5), warm_start=True))
    state, _ = ladder.step(ladder.init({name: torch.ones(2).double() for name in "abc"}), {})
    assert compare([Marked()], ladder, state, {}, **FAST)["Marked()"].reason is None


# --- what goes wrong, and what does not change -------------------------------------------------------------------


def test_an_estimator_that_fails_has_a_row() -> None:
    class Broken(fm.BestResponse):
        def vjp(self, solved, cotangent, state):
            raise ZeroDivisionError("by design")

    class Infinite(fm.BestResponse):
        def vjp(self, solved, cotangent, state):
            return {name: x / 0 for name, x in solved.inputs.items()}, state, fm.Stats()

    found = against_problem({"itd": fm.ITD(), "broken": Broken(), "inf": Infinite(), "good": fm.AID(fm.CG(20))})
    assert found["itd"].reason.startswith("EstimatorError: ITD differentiates the inner steps, but none were made")
    assert found["broken"].reason == "ZeroDivisionError: by design"
    assert found["inf"].reason.startswith("NonFiniteError: ")
    assert found["itd"].error is None
    assert found["good"].reason is None
    assert "ZeroDivisionError: by design" in str(found)
    assert found.best(1e-6) == fm.AID(fm.CG(20))


def test_warnings_are_notes_of_their_row() -> None:
    program = fm.Multilevel(
        fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, lambda x: torchopt.sgd(x.mean()), response=fm.ITD(), steps=3),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.zeros(2).double(), "x": torch.full((2,), 0.5).double()})
    found = compare([fm.AID(fm.CG(3)), fm.ITD()], program, state, {}, **FAST)
    assert "does not look at what its init, optimizer or projection reads" in found["AID(CG(3))"].notes[0]
    assert found["ITD()"].notes == ()
    assert "AID(CG(3)) [1]" in str(found)


def test_nothing_changes() -> None:
    class Drawing(fm.BestResponse):
        claims = fm.Claims(stochastic=True, exact=False)

        def vjp(self, solved, cotangent, state):
            return {name: torch.randn_like(x) for name, x in solved.inputs.items()}, state, fm.Stats()

    program, state = sequence()
    batches = {"y": moving(0)}
    tensors = [*_tree.leaves(state), *batches.values()]
    before = [(x.clone(), x._version) for x in tensors]
    generator = torch.get_rng_state()
    response = program.levels[0].response
    compare([Drawing(), fm.ITD(), fm.ForwardGradient(2)], program, state, batches, **FAST)
    assert torch.equal(torch.get_rng_state(), generator)
    for x, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert program.levels[0].response is response


def test_a_state_that_is_written_to_is_an_error() -> None:
    program, state = sequence()

    class Writing(fm.BestResponse):
        def vjp(self, solved, cotangent, state_):
            state.optimizer["y"], _ = state.optimizer["y"], state.params["x"].add_(0)
            return {name: torch.zeros_like(x) for name, x in solved.inputs.items()}, state_, fm.Stats()

    with pytest.raises(fm.LossError, match="changed in place"):
        compare([Writing()], program, state, {"y": moving(0)}, **FAST)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"estimators": []}, "no estimators to compare"),
        ({"estimators": fm.ITD()}, "came as ITD; expected a list"),
        ({"estimators": [fm.ITD(), fm.ITD()]}, "two estimators are ITD"),
        ({"estimators": {"cg": fm.CG(3)}}, "estimator 'cg' is CG; expected a best response"),
        ({"program": None}, "program came as NoneType"),
        ({"state": {}}, "expected the State that program.init returns; that of dict came"),
        ({"of": "z"}, "no level is called 'z'"),
        ({"of": "y"}, "differentiates through no lower level"),
        ({"through": "yy"}, "does not differentiate through it; did you mean 'y'"),
        ({"through": []}, "through= is empty"),
        ({"batches": {"y": itertools.repeat(moving(0))}}, "is an iterator, but hypergradient is pure"),
        ({"batches": {}}, "takes a batch, but none came"),
        ({"repeats": 0}, "repeats=0; expected an integer of at least 1"),
        ({"samples": 1}, "samples=1; expected an integer of at least 2"),
        ({"reference": "exact"}, "reference='exact'; expected 'implicit', 'unrolled'"),
        ({"reference": torch.zeros(3)}, "expected None, 'implicit', 'unrolled', an estimator, or a gradient like"),
    ],
)
def test_wrong_use(change: dict[str, object], match: str) -> None:
    program, state = sequence()
    arguments = {"estimators": [fm.ITD()], "program": program, "state": state, "batches": {"y": moving(0)}, **change}
    positional = [arguments.pop(name) for name in ("estimators", "program", "state", "batches")]
    with pytest.raises(fm.FuncmloError, match=match):
        compare(*positional, **arguments)


@pytest.mark.filterwarnings("ignore::funcmlo.FuncmloWarning")
def test_several_top_levels_need_a_name() -> None:
    lower = fm.Level("y", lambda y, a, b: ((y - a - b) ** 2).sum(), torchopt.sgd(0.1), response=fm.AID(fm.CG(3)))
    tops = [
        fm.Level("a", lambda a, y: (y**2).sum(), torchopt.sgd(0.1)),
        fm.Level("b", lambda b, y: y.sum(), torchopt.sgd(0.1)),
    ]
    program = fm.Multilevel(lower, *tops)
    state = program.init({name: torch.ones(2).double() for name in "yab"})
    with pytest.raises(fm.DefinitionError, match="several top levels, a, b; say of='b'"):
        compare([fm.ITD()], program, state, {})
    found = compare([fm.AID(fm.CG(3)), fm.AID(fm.CG(3), warm_start=True)], program, state, {}, of="a", **FAST)
    assert all(row.error < ROUNDING for row in found)


# --- the result --------------------------------------------------------------------------------------------------


def made(*rows: Row) -> Comparison:
    return replace(against_problem([fm.AID(fm.CG(20))]), rows=rows)


def row(name: str, error: float | None, seconds: float | None, **fields: object) -> Row:
    return Row(name, fm.AID(fm.CG(len(name))), error=error, seconds=seconds, memory=10, **fields)


def test_best_is_the_cheapest_that_is_good_enough() -> None:
    found = made(
        row("a", 1e-2, 1.0, hvps=9),
        row("bb", 1e-3, 2.0, hvps=2),
        row("ccc", 1e-9, 3.0, hvps=2),
        row("dddd", None, None, reason="broken"),
    )
    assert found.best(0.1) == fm.AID(fm.CG(1))
    assert found.best(1e-2) == fm.AID(fm.CG(1))
    assert found.best(5e-3) == fm.AID(fm.CG(2))
    assert found.best(0.1, cost="hvps") == fm.AID(fm.CG(3))  # of two that cost the same, the more accurate
    with pytest.raises(fm.EstimatorError, match="within 1e-12 of the reference: the nearest is ccc, 1e-09 off"):
        found.best(1e-12)
    with pytest.raises(fm.EstimatorError, match="none has an answer"):
        made(row("dddd", None, None, reason="broken")).best(1.0)
    with pytest.raises(fm.EstimatorError, match="cost='money'; expected 'seconds', 'hvps'"):
        found.best(1.0, cost="money")
    with pytest.raises(fm.EstimatorError, match="no estimator is called 'bbb'; did you mean 'bb'"):
        found["bbb"]
    assert (len(found), [r.name for r in found]) == (4, ["a", "bb", "ccc", "dddd"])


def test_the_table_fits_and_html_holds_the_same() -> None:
    long = fm.AID(fm.GradientSteps(torchopt.sgd(1.0, momentum=0.5), 3), curvature=fm.Damped(0.1))
    found = against_problem([fm.ITD(), long, fm.ForwardGradient(2), fm.Penalty()], steps=3)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 120
    assert repr(found) == str(found)
    assert lines[0] == "Hypergradient of level 'x' through 'y'"
    assert lines[2].split() == [
        *("estimator", "error", "cosine", "bias", "seconds", "HVPs", "grads", "steps", "iter.", "residual", "memory")
    ]
    source = found._repr_html_()
    assert source.count("<tr") == 1 + 4
    assert "http" not in source
    assert "<script" not in source
    assert " id=" not in source
    assert f"{found['ITD()'].error:.3g}" in source
    named = against_problem({"<b>&": fm.AID(fm.CG(2))})._repr_html_()
    assert "&lt;b&gt;&amp;" in named
    assert "<b>" not in named
    assert "HVPs" not in str(against_problem([fm.FiniteDifference()]))  # a column without anything is left out
    assert table.text([table.Column("name", left=True)], [["x" * 50]], width=20).splitlines()[2] == "x" * 19 + "…"


def test_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    found = against_problem([fm.AID(fm.CG(2)), fm.AID(fm.CG(20))])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(fm.EstimatorError, match="pip install pandas"):
            found.to_pandas()
    frame = found.to_pandas()
    assert list(frame.index) == ["AID(CG(2))", "AID(CG(20))"]
    assert frame.loc["AID(CG(2))", "error"] == found["AID(CG(2))"].error
    assert "gradient" not in frame


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot as plt

    estimators = [fm.ITD(), fm.AID(fm.CG(2)), fm.AID(fm.CG(4)), fm.FiniteDifference(), fm.ForwardGradient(2)]
    found = against_problem(estimators, steps=5)
    for cost in ("seconds", "hvps", "gradients", "steps", "memory"):
        axes = found.plot(cost)
        axes.figure.canvas.draw()
        written = {text.get_text() for text in axes.texts}
        assert {r.name for r in found} <= written
        assert sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() not in ("None", None, "")) == len(found)
        assert axes.get_xlabel()
        assert axes.get_yscale() == "log"
        assert axes.get_xscale() == ("log" if cost in ("seconds", "memory") else "symlog")
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in {r.name for r in found}]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), cost
        plt.close(axes.figure)
    crowd = made(*(row(f"estimator {i}", 0.1, 1.0) for i in range(12)))  # all in one place
    axes = crowd.plot()
    axes.figure.canvas.draw()
    bare = mpl.text.Text.get_window_extent  # without the line to the point
    boxes = [bare(text) for text in axes.texts if text.get_text().startswith("estimator")]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plt.close(axes.figure)
    figure, own = plt.subplots()
    assert found.plot(axes=own) is own
    plt.close(figure)
    with pytest.raises(fm.EstimatorError, match="no estimator has an error"):
        made(row("dddd", None, None, reason="broken")).plot()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(fm.EstimatorError, match="pip install matplotlib"):
        found.plot()
