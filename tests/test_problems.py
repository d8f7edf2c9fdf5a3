"""Problems with known hypergradients: the solution, the response and the assumptions are what they are said to be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo.operators import ravel, unravel
from funcmlo.testing import classics, equilibrium, literature, network, quadratic, regression, saddle, singular
from funcmlo.testing.by_hand import solved
from funcmlo.testing.equilibrium import Equilibrium
from funcmlo.testing.family import problems
from funcmlo.testing.known import Bilevel, Known
from funcmlo.testing.literature import SMD
from tests.oracles import assert_agrees, bits, finite_difference

MODULES = (classics, equilibrium, literature, network, quadratic, regression, saddle, singular)
NAMES = {"torch": torch, "torchopt": torchopt, **{name: x for module in MODULES for name, x in vars(module).items()}}
PROBLEMS = problems()
BILEVEL = [problem for problem in PROBLEMS if isinstance(problem, Bilevel)]
EPSILON = torch.finfo(torch.float64).eps

each = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
each_bilevel = pytest.mark.parametrize("problem", BILEVEL, ids=repr)


def residual(problem: Known) -> Callable[[Tensor, Tensor], Tensor]:
    """The condition r(y, x) = 0 that a solution meets, on flat vectors."""
    y, x = problem.solution(), problem.x
    if isinstance(problem, Equilibrium):
        return lambda at, upper: at - problem.map(at, upper)
    return lambda at, upper: torch.func.grad(lambda z: problem.inner(unravel(z, y), unravel(upper, x)))(at)


def jacobian(problem: Known, x: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    r, at = residual(problem), ravel(problem.x) if x is None else x
    return torch.func.jacrev(lambda y: r(y, at))


@functools.cache
def solve(problem: Known, x: tuple[float, ...]) -> Tensor:
    """y*(x) near the problem's own, by Newton's method on dense Jacobians; what a singular one leaves free stays."""
    at, y = torch.tensor(x, dtype=torch.float64), ravel(problem.solution())
    for _ in range(4):  # from 1e-3 away: 1e-6, 1e-12, rounding
        y = y - torch.linalg.pinv(jacobian(problem, at)(y), rtol=1e-12) @ residual(problem)(y, at)
    return y


def some_vector(problem: Known) -> Tensor:
    """A vector of y's space; of the Hessian's range where that is not all, for elsewhere Jᵀv is a convention."""
    v = torch.cos(torch.arange(ravel(problem.solution()).numel(), dtype=torch.float64))
    if "nonsingular" not in problem.assumptions:
        hessian = jacobian(problem)(ravel(problem.solution()))
        v = torch.linalg.pinv(hessian, rtol=1e-12) @ (hessian @ v)
    return v


@each
def test_the_solution_is_stationary_to_rounding(problem: Known) -> None:
    y = ravel(problem.solution())
    size = (1 + torch.linalg.matrix_norm(jacobian(problem)(y))) * (1 + torch.linalg.vector_norm(y))
    # A dozen roundings of terms of the size of Hy each.
    assert torch.linalg.vector_norm(residual(problem)(y, ravel(problem.x))) <= 12 * EPSILON * size
    assert torch.linalg.vector_norm(y - ravel(problem.start)) > 1e-2


@each_bilevel
def test_the_optimizer_reaches_it_from_the_start(problem: Bilevel) -> None:
    target, like = ravel(problem.solution()), problem.start

    def step(y: Tensor) -> Tensor:
        gradient = unravel(residual(problem)(y, ravel(problem.x)), like)
        updates, _ = problem.optimizer.update(gradient, problem.optimizer.init(like), params=like, inplace=False)
        return y + ravel(updates)

    errors = [ravel(problem.start) - target]
    for _ in range(problem.steps):
        errors.append(step(target + errors[-1]) - target)
    half = problem.steps // 2
    assert torch.linalg.vector_norm(errors[half]) <= 1e-5
    # From there on the error e is small enough for e ↦ Je: second derivatives change a step's factor by a multiple of
    # ‖e‖ ≤ 1e-5, over a thousand steps by less than 2. Each step rounds y once more.
    change = torch.linalg.matrix_power(torch.func.jacrev(step)(target), problem.steps - half)
    rounding = 2 * EPSILON * problem.steps * (1 + torch.linalg.vector_norm(target))
    bound = 2 * torch.linalg.vector_norm(change @ errors[half]) + rounding
    assert bound <= 1e-12 * (1 + torch.linalg.vector_norm(target) + torch.linalg.vector_norm(errors[0]))
    assert torch.linalg.vector_norm(errors[-1]) <= bound


@each
def test_response_and_hypergradient_are_differences_of_the_problem_solved_again(problem: Known) -> None:
    y, x, v = problem.solution(), problem.x, some_vector(problem)
    reference, error = finite_difference(lambda at: solve(problem, tuple(at.tolist())) @ v, ravel(x))
    size = torch.linalg.vector_norm(reference)
    assert_agrees(problem.response(unravel(v, y)), reference, error, relative=1e-8)
    assert size > 1e-3
    reference, error = finite_difference(
        lambda at: problem.outer(unravel(at, x), unravel(solve(problem, tuple(at.tolist())), y)), ravel(x)
    )
    assert_agrees(problem.hypergradient(), reference, error, relative=1e-8)


@each
def test_the_assumptions_are_true_and_the_others_false(problem: Known) -> None:
    j = jacobian(problem)(ravel(problem.solution()))
    asymmetry = torch.linalg.matrix_norm(j - j.T) / torch.linalg.matrix_norm(j)
    assert asymmetry < 1e-14 if "minimization" in problem.assumptions else asymmetry > 1e-2
    smallest = torch.linalg.svdvals(j)[-1] / torch.linalg.svdvals(j)[0]
    assert smallest > 1e-2 if "nonsingular" in problem.assumptions else smallest < 1e-14
    definite = bool(asymmetry < 1e-14) and bool(torch.linalg.eigvalsh(j)[0] > 1e-2 * torch.linalg.eigvalsh(j)[-1])
    assert definite == ("positive definite" in problem.assumptions)
    assert "its own level" not in problem.assumptions


@each
def test_the_repr_is_the_code_that_makes_it_again(problem: Known) -> None:
    again = eval(repr(problem), dict(NAMES))
    assert again == problem
    assert hash(again) == hash(problem)
    assert bits((again.x, again.start, again.solution())) == bits((problem.x, problem.start, problem.solution()))
    fields = dataclasses.fields(problem)
    if any(f.name == "seed" for f in fields):
        other = dataclasses.replace(problem, seed=problem.seed + 1)
        assert other != problem
        assert bits(other.x) != bits(problem.x)


def exact(problem: Known) -> list[fm.BestResponse]:
    if not isinstance(problem, Bilevel):
        return [fm.AID(fm.GMRES(20)), fm.AID(fm.Direct()), fm.ITD()]
    return [fm.AID(fm.Direct() if "nonsingular" in problem.assumptions else fm.CG(20)), fm.ITD()]


# What the loop leaves of the start's distance, 1e-12 as tested above, times second derivatives of order 10; ITD multiplies
# it by up to `steps` where the factors are largest.
LEFT = 1e-10


@each
def test_exact_estimators_reproduce_the_hypergradient(problem: Known) -> None:
    known, x = ravel(problem.hypergradient()), ravel(problem.x)
    for estimator in exact(problem):
        objective = problem.objective(estimator)
        gradient, value = torch.func.grad_and_value(lambda at, of=objective: of(unravel(at, problem.x)))(x)
        assert_agrees(gradient, known, relative=LEFT)
        at_solution = problem.outer(problem.x, problem.solution())
        assert abs(value - at_solution) <= LEFT * (1 + abs(at_solution))


@each_bilevel
def test_exact_estimators_reproduce_it_as_a_program(problem: Bilevel) -> None:
    known = ravel(problem.hypergradient())
    implicit, unrolled = exact(problem)
    program = problem.program(implicit)
    at_solution = program.hypergradient(problem.state(program), {}, of="x", solve=False)
    assert_agrees(at_solution, known, relative=1e-12)
    for estimator in (implicit, unrolled) if problem.steps < 100 else (implicit,):
        program = problem.program(estimator)
        state = problem.state(program, solved=False)
        assert_agrees(program.hypergradient(state, {}, of="x"), known, relative=LEFT)
    assert problem.program(implicit, steps=3).levels[0].steps == 3


@each_bilevel
def test_an_estimator_s_product_is_the_response(problem: Bilevel) -> None:
    # Not with the problem's own cotangent, which is zero in all of SMD.
    v = unravel(some_vector(problem), problem.solution())
    estimator = exact(problem)[0]
    at = solved(lambda y, inputs: problem.inner(y, inputs["x"]), problem.solution(), {"x": problem.x}, estimator)
    assert_agrees(estimator.vjp(at, v, None)[0]["x"], ravel(problem.response(v)), relative=1e-12)


def test_the_network_is_not_convex_and_smd_s_upper_gradient_is_zero_at_the_solution() -> None:
    for problem in BILEVEL:
        if isinstance(problem, network.Network):
            zero = torch.zeros_like(ravel(problem.solution()))
            assert torch.linalg.eigvalsh(jacobian(problem)(zero))[0] < -0.1
        if isinstance(problem, SMD):
            y = torch.func.grad(problem.outer, argnums=1)(problem.x, problem.solution())
            assert torch.linalg.vector_norm(ravel(y)) < 1e-14


def test_the_classics_have_the_optima_of_their_sources() -> None:
    # Mitsos and Barton: 1.5 s² + 0.5 s − 0.5 = 0 with s = √x; Mirrlees: (1, 0.958) is on the curve of best responses.
    assert abs(classics.MitsosBarton(((13**0.5 - 1) / 6) ** 2).hypergradient()) < 1e-15
    assert abs(classics.Mirrlees(0.958).x - 1) < 0.02


@pytest.mark.parametrize("empty", ["y_like", "x_like"])
def test_a_quadratic_may_have_no_entries(empty: str) -> None:
    problem = quadratic.Quadratic(**{empty: []})
    assert_agrees(problem.hypergradient(), torch.zeros(0) if empty == "x_like" else problem.x, relative=0.0)
    assert problem.solution() == [] if empty == "y_like" else problem.solution().norm() == 0


def test_problems_that_do_not_exist_are_refused() -> None:
    with pytest.raises(fm.DefinitionError, match=r"SMD\(6\): expected one of 1, 2, 3, 4, 5, 7, 8"):
        SMD(6)

    class Flat(network.Network):
        def inner(self, y: object, x: object) -> Tensor:
            return 0 * super().inner(y, x)

    with pytest.raises(fm.DefinitionError, match=r"Network\(seed=0\) has no strict minimum"):
        Flat()
