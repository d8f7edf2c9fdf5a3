"""Faults that reviews found among the estimators, each with the test that failed before it was mended."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from tests.registry import solved, vector_like

pytestmark = pytest.mark.filterwarnings("ignore:composition=")

ZERO, X = torch.zeros(2).double(), torch.tensor([1.0, 5.0]).double()


def middle(
    response: fm.BestResponse, optimizer: object, project: Callable | None = None, cost: Callable | None = None
) -> Tensor:
    """∇_x ‖z*‖² where z's gradient has the constant 3 from the level below it."""
    program = fm.Multilevel(
        fm.Level("w", lambda w, z: ((w - z) ** 2).sum() / 2, torchopt.sgd(1.0), response=fm.AID(fm.CG(5))),
        fm.Level(
            "z",
            cost or (lambda z, x, w: ((z - x) ** 2).sum() / 2 + 3 * w.sum()),
            optimizer,
            steps=200,
            response=response,
            project=project,
        ),
        fm.Level("x", lambda x, z: (z**2).sum(), torchopt.sgd(0.1)),
    )
    return program.hypergradient(program.init({"w": ZERO, "z": ZERO, "x": X}), {}, of="x")


@pytest.mark.parametrize(
    "response",
    [
        fm.AID(fm.GMRES(50), curvature="fixed_point"),
        fm.Penalty(1e-2, steps=60),
        fm.Penalty(1e-2, steps=60, optimizer=torchopt.sgd(0.5)),
        fm.ITD(),
    ],
    ids=["fixed point", "penalty", "penalty with its own optimizer", "itd"],
)
def test_an_estimator_that_makes_a_step_knows_what_levels_below_add_to_it(response: fm.BestResponse) -> None:
    # z* = max(x − 3, ½): the first entry is held back.
    answer = middle(response, torchopt.sgd(0.5), lambda z: z.clamp(min=0.5))
    assert torch.allclose(answer, torch.tensor([0.0, 4.0]).double(), atol=1e-8)


def test_a_penalty_minimizes_with_what_levels_below_add() -> None:
    def quartic(z, x, w):
        return (0.25 * z**4 + (z - x) ** 2 / 2).sum() + 3 * w.sum()

    exact = middle(fm.ITD(), torchopt.sgd(0.1), cost=quartic)
    for own in (None, torchopt.sgd(0.1)):
        answer = middle(fm.Penalty(1e-3, steps=200, optimizer=own), torchopt.sgd(0.1), cost=quartic)
        assert torch.allclose(answer, exact, rtol=1e-4)


@pytest.mark.parametrize("project", [lambda y: y.clamp_(min=0), lambda y: y.clamp(min=0)], ids=["in place", "anew"])
def test_a_projection_may_write_to_what_it_is_given(project: Callable) -> None:
    x = torch.tensor([3.0, -1.0]).double()
    for response in (fm.AID(fm.GMRES(5), curvature="fixed_point"), fm.OneStep(), fm.ITD(memory="mixed")):
        program = fm.Multilevel(
            fm.Level(
                "y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), steps=30, project=project, response=response
            ),
            fm.Level("x", lambda x, y: ((y - 1) ** 2).sum(), torchopt.sgd(0.1)),
        )
        answer = program.hypergradient(program.init({"y": torch.ones(2).double(), "x": x}), {}, of="x")
        assert torch.allclose(answer, torch.tensor([4.0, 0.0]).double())


@pytest.mark.parametrize("response", [fm.SAMA(), fm.OneStep(), fm.AID(fm.OptimizerIdentity())], ids=repr)
@pytest.mark.parametrize("steps", [5, 60])
def test_argmin_hands_over_the_optimizers_last_state(response: fm.BestResponse, steps: int) -> None:
    a, init, x = torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double(), torch.tensor([0.3, -0.7]).double()
    adam = torchopt.adam(0.05)

    def cost(y, x):
        return (0.5 * a * (y - x) ** 2).sum()

    program = fm.Multilevel(
        fm.Level("y", cost, adam, steps=steps, response=response),
        fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
    )
    expected = program.hypergradient(program.init({"y": init, "x": x}), {}, of="x")
    solve = fm.argmin(cost, adam, steps=steps, response=response)
    assert torch.allclose(torch.func.grad(lambda x: (solve(init, x) ** 2).sum())(x), expected, rtol=1e-5)


FORWARD = {
    "cg": fm.AID(fm.CG(5), curvature=fm.Hessian("forward")),
    "mixed": fm.ITD(memory="mixed"),
    "forward": fm.ITD(mode="forward"),
    "sampled": fm.ForwardGradient(2),
}


@pytest.mark.parametrize("first", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("second", FORWARD.values(), ids=FORWARD)
def test_a_batch_made_inside_a_derivative_does_not_stay_there(first: fm.BestResponse, second: fm.BestResponse) -> None:
    program = fm.Multilevel(
        fm.Level(
            "y",
            lambda y, p, q, batch: (0.5 * (y - p - 2 * q - batch) ** 2).sum(),
            torchopt.sgd(0.5),
            steps=2,
            response={"p": first, "q": second},
        ),
        fm.Level("p", lambda p, y: (y**2).sum(), torchopt.sgd(0.1)),
        fm.Level("q", lambda q, y: (y**3).sum(), torchopt.sgd(0.1)),
    )
    state = program.init({"y": torch.ones(2).double(), "p": ZERO, "q": ZERO})

    def source(t: int) -> Tensor:
        return torch.ones(2).double() * t

    made = [source(t) for t in range(9)]
    after, _ = program.step(state, {"y": source})
    assert torch.equal(after.params["q"], program.step(state, {"y": made.__getitem__})[0].params["q"])
    if first.requires == "solution":
        assert torch.isfinite(program.hypergradient(after, {"y": source}, of="p", solve=False)).all()


def nested(response: fm.BestResponse, **fields: object) -> fm.Multilevel:
    return fm.Multilevel(
        fm.Level("w", lambda w, z: ((w - z) ** 2).sum() / 2, torchopt.sgd(1.0), response=fm.AID(fm.CG(5))),
        fm.Level(
            "z",
            lambda z, x, w: ((z - x) ** 2).sum() / 2 + (w**2).sum(),
            torchopt.sgd(0.3),
            steps=80,
            response=response,
            **fields,
        ),
        fm.Level("x", lambda x, z: z.sum(), torchopt.sgd(0.1)),
        composition="nested",
    )


def test_what_does_not_work_on_a_cost_with_solutions_inside_is_refused() -> None:
    for curvature in (fm.GaussNewton(lambda z, x: z - x, lambda f: (f**2).sum() / 2), fm.Hessian("forward")):
        for wrapped in (curvature, fm.Damped(0.1, curvature), fm.Resampled(curvature)):
            with pytest.raises(
                fm.DefinitionError, match=r"'z': AID\(.* does not work on a cost with solutions inside .*of w"
            ):
                nested(fm.AID(fm.CG(10), curvature=wrapped))
    program = nested(fm.AID(fm.CG(10), curvature=fm.Hessian("recompute")))
    answer = program.hypergradient(program.init({"w": ZERO, "z": ZERO, "x": X}), {}, of="x")
    assert torch.allclose(answer, torch.full((2,), 1 / 3).double())


@pytest.mark.parametrize(
    "response", [fm.OneStep(), fm.SAMA(), fm.Penalty(0.1, steps=3), fm.AID(fm.GMRES(5), curvature="fixed_point")], ids=repr
)
def test_a_step_that_reads_a_level_below_is_refused_when_nested(response: fm.BestResponse) -> None:
    with pytest.raises(fm.DefinitionError, match=r"level 'z': .* looks at the optimizer's step, which reads w below it"):
        nested(response, project=lambda z, w: torch.maximum(z, w - 9))


def test_parts_of_aid_that_do_not_fit() -> None:
    with pytest.raises(fm.DefinitionError, match=r"Nystrom\(3\)\): damping=None suits a preconditioner.*expected Nystrom"):
        fm.AID(fm.Nystrom(3))
    fm.AID(fm.CG(3, preconditioner=fm.Nystrom(3)))
    with pytest.raises(fm.DefinitionError, match=r"instead of a fresh one; expected Resampled\(Hessian\('fin"):
        fm.AID(fm.Neumann(3, scale=1.0), curvature=fm.Resampled(), cross="finite_difference")


def test_resampled_by_differences_takes_fresh_batches() -> None:
    batches = [1.0, 1.0, 3.0, 5.0, 7.0, 9.0]
    answers = []
    for products in ("kept", "finite_difference"):
        response = fm.AID(fm.Neumann(3, scale=1.0), curvature=fm.Resampled(fm.Hessian(products)))
        program = fm.Multilevel(
            fm.Level(
                "y", lambda y, x, batch: (0.5 * (y - batch * x) ** 2).sum(), torchopt.sgd(0.5), steps=2, response=response
            ),
            fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
        )
        state = program.init({"y": torch.ones(2).double(), "x": torch.ones(2).double()})
        answers.append(program.hypergradient(state, {"y": batches.__getitem__}, of="x"))
    assert torch.allclose(answers[0], torch.full((2,), batches[5]).double())
    assert torch.allclose(answers[1], answers[0], rtol=1e-6)


def test_what_a_projection_or_a_start_reads_is_not_lost_in_silence() -> None:
    with pytest.warns(fm.FuncmloWarning, match=r"AID\(CG\(5\)\) does not look at .* reads of b"):
        fm.Multilevel(
            fm.Level(
                "z",
                lambda z, x: ((z - x) ** 2).sum() / 2,
                fm.Solver(lambda z, x: x.clone()),
                response=fm.AID(fm.CG(5)),
                project=lambda z, b: torch.minimum(z, b),
            ),
            fm.Level("b", lambda b, z: (z**2).sum(), torchopt.sgd(0.1)),
            fm.Level("x", lambda x, z: (z**2).sum(), torchopt.sgd(0.1)),
        )
    for response in (fm.ITD(window=2), fm.OneStep(), fm.AID(fm.GMRES(3), curvature="fixed_point")):
        with pytest.warns(fm.FuncmloWarning, match=r"does not look at .* reads of meta.* use ITD\(\)"):
            fm.Multilevel(
                fm.Level("y", lambda y: (y**2).sum(), torchopt.sgd(0.1), steps=5, response=response, init=lambda meta: meta),
                fm.Level("meta", lambda meta, y: (y**2).sum(), torchopt.sgd(0.1)),
            )


@pytest.mark.parametrize(
    "project", [torch.nn.Hardtanh(), lambda *trees: trees[0], torch.relu], ids=["module", "*args", "builtin"]
)
def test_a_projection_that_names_no_arguments_takes_the_parameters(project: Callable) -> None:
    level = fm.Level("y", lambda y: (y**2).sum(), torchopt.sgd(0.1), project=project)
    assert level.reads_levels == ()
    assert torch.equal(level.projected(torch.full((2,), 0.5), {}), torch.full((2,), 0.5))


def test_samples_that_cannot_be_mapped_are_told_what_to_do() -> None:
    def loss(y: Tensor, x: dict[str, Tensor]) -> Tensor:
        return (y * x["x"]).sum() * float(x["x"].sum() > -1e9)

    at = solved(loss, torch.zeros(2), {"x": torch.ones(2)}, fm.PerturbedSolve(2), steps=1)
    with pytest.raises(fm.EstimatorError, match=r"cannot be mapped together .*; give chunk=1"):
        fm.PerturbedSolve(2).vjp(at, torch.ones(2), None)
    answer, _, _ = fm.PerturbedSolve(2, chunk=1).vjp(at, torch.ones(2), None)
    assert torch.isfinite(answer["x"]).all()


def test_a_fixed_points_seed_reaches_its_estimator() -> None:
    x, init = vector_like(torch.zeros(4).double(), 1), torch.zeros(4).double()

    def slope(seed: int) -> Tensor:
        settle = fm.fixed_point(lambda y, x: 0.3 * torch.sin(y) + x, steps=5, response=fm.ForwardGradient(1), seed=seed)
        return torch.func.grad(lambda x: settle(init, x).sum())(x)

    assert torch.equal(slope(0), slope(0))
    assert not torch.equal(slope(0), slope(7))


def test_a_block_raises_where_a_column_does() -> None:
    operator = fm.Operator(lambda u: torch.tensor([1.0, 9.0]).double() * u, like=ZERO)
    v = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
    with pytest.raises(fm.EstimatorError, match=r"CG did not converge for 1 of 2 columns"):
        fm.CG(1, throw=True).init(operator).solve_block(v)
    assert not bool(fm.CG(1).init(operator).solve_block(v).converged.all())
    empty = fm.CG(1).init(fm.Operator(lambda u: u, like={})).solve_block({})
    assert empty.value == {}


def test_chained_solutions_draw_their_own_directions() -> None:
    # Two solution maps, one after the other: with the same draws in both the mean would be N times the derivative.
    n, runs = 4, 400
    inner, outer = (
        fm.argmin(lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(1.0), steps=1, response=fm.ForwardGradient(1, seed=0))
        for _ in range(2)
    )
    zero = torch.zeros(n).double()

    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: outer(zero, inner(zero, 2 * x) ** 2 + x).sum())(x)

    points = [0.5 + 0.01 * k + torch.arange(n).double() for k in range(runs)]
    ratios = torch.stack([slope(x).sum() / (8 * x + 1).sum() for x in points])
    standard_error = float(ratios.std()) / runs**0.5
    assert abs(float(ratios.mean()) - 1) <= 5 * standard_error  # false alarm: 6e-7
    assert 5 * standard_error < n - 1
    assert all(torch.equal(slope(x), slope(x)) for x in itertools.islice(points, 2))
