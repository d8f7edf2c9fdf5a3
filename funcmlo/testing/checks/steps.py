"""Does an estimator see the right point and the right steps?"""

from __future__ import annotations

from typing import Any

import torch
import torchopt
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import ravel
from funcmlo.testing import settings
from funcmlo.testing.checks.base import Check, any_level, check, implicit, settled, unrolled
from funcmlo.testing.checks.products import judged
from funcmlo.testing.examined import STEPS, Answer, Examined, distance, told, unit
from funcmlo.testing.matrices import Matrices, cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding


def _turns(examined: Examined) -> str | None:
    turns = settings.counts(examined.estimator) and not examined.claims.exact
    return None if turns else "it has no knob that counts, or claims to be exact without turning it"


@check(any_level, settled, _turns)
def knob_without_limit(examined: Examined) -> Finding:
    """As its knob is turned up the answer stands still, on a Hessian with eigenvalues from 0.1 to 1."""
    last, moved = examined.turned
    found, name = settings.knob(last.estimator), examined.claims.knob
    message = f"from {name}={found[1] if found else '?'} to twice that the answer changes by {moved:.2g} of itself: "
    message += "it diverges, or is too slow to be judged; the checks' Hessians have eigenvalues from 0.1 to 1"
    return Finding(moved, 1e-8, message)


def _damped(examined: Examined) -> str | None:
    return None if settings.dampings(examined.estimator) else "it has no setting named damping"


@check(any_level, implicit, settled, _damped)
def damping(examined: Examined) -> Finding:
    """damping=λ solves (H + λI)w = v: λ is added once."""
    path, _ = settings.dampings(examined.estimator)[0]
    changed = Examined(settings.put(examined.estimator, path, 0.3), examined.seed).converged
    problem, v = Matrices(symmetric(4, 3.0, examined.seed), torch.eye(4).double()), normal(flat(4), examined.seed + 1)
    answer, total = changed.answer(problem, v), changed.damping
    message = f"damping={total} did not give (H + {total}I)⁻¹v"
    for factor in (0.0, 2.0):
        if distance(answer.value, changed.target(problem, v, damping=factor * total)) < 1e-3:
            message += f"; it gave (H + {factor * total:g}I)⁻¹v"
    return judged(changed, answer, changed.target(problem, v), 3.0, message)


def _told(examined: Examined) -> str | None:
    answer = examined.answer(Matrices(torch.eye(2).double(), torch.eye(2).double()), torch.ones(2).double())
    return "its stats tell no residual" if told(answer.stats, "residual") is None else None


@check(any_level, implicit, settled, _told)
def reported_residual(examined: Examined) -> Finding:
    """With B = I the answer is w: ‖v − (H + λI)w‖ / ‖v‖ is at most what the stats say, however early the solver stopped."""
    # One that is an iterate old overstates; one that drifted promises too much, which a thousandth of it may be.
    n = 8
    problem, v = Matrices(symmetric(n, 100.0, examined.seed), torch.eye(n).double()), normal(flat(n), examined.seed + 1)
    found = settings.knob(examined.estimator)
    early = (1, 2, 4) if settings.counts(examined.estimator) else ()
    variants = [settings.put(examined.estimator, found[0], k) for k in early] if found else []
    worst, allowed, message = 0.0, 1e-8 if examined.claims.exact else 1e-6, "no residual is told"
    for estimator in (*variants, examined.converged.estimator):
        one = Examined(estimator, examined.seed)
        answer = one.answer(problem, v)
        residual = told(answer.stats, "residual")
        if residual is None:
            continue
        true = float((v - problem.a @ answer.value - one.damping * answer.value).norm() / v.norm())
        understated = 0.999 * true - float(residual)
        if not understated <= worst:
            worst, message = understated, f"the stats say {float(residual):.3g}, but v − (H + λI)w is {true:.3g} of v"
    return Finding(worst, allowed, message)


@check(any_level, settled)
def cross_term_at_the_start(examined: Examined) -> Finding:
    """The mixed derivative −∇²_xy g is taken at the solution, not where the inner loop began."""
    problem = Matrices(symmetric(3, 2.0, examined.seed), cross(3, 2, examined.seed) / 10, bend=torch.sin)
    x, v, start = normal(flat(2), examined.seed), normal(flat(3), examined.seed + 1), normal(flat(3), examined.seed + 2)
    examined = examined.converged
    at = examined.at(problem, x=x, start=start, steps=80)
    products, _, stats = examined.estimator.vjp(at, v, examined.estimator.init(at.params))
    answer = Answer(ravel(products["x"]), 0.0, stats)
    expected = _reference(examined, problem, at, v, at.params)
    wrong = _reference(examined, problem, at, v, start)
    message = "the answer is not that at the solution"
    if distance(answer.value, wrong) < 0.1 * distance(answer.value, expected):
        message += "; it is that of the mixed derivative at the loop's start"
    if not examined.promises_size:
        return Finding(distance(unit(answer.value), unit(expected)), examined.accuracy, message)
    return judged(examined, answer, expected, 3.0, message)


@check(any_level, unrolled)
def steps_counted(examined: Examined) -> Finding:
    """Of 1, 5 and 12 steps, which leave much of the start, the derivative is that of so many, not of one less or more."""
    problem, v = Matrices(symmetric(4, 10.0, examined.seed), cross(4, 2, examined.seed)), normal(flat(4), examined.seed + 1)
    examined = examined.converged
    findings = []
    for steps in (STEPS, 1, 12):
        answer, expected = examined.answer(problem, v, steps=steps), examined.target(problem, v, steps=steps)
        message = f"the answer is not the derivative of {steps} steps"
        for other in (steps - 1, steps + 1):
            if distance(answer.value, examined.target(problem, v, steps=other)) < 1e-3:
                message += f"; it is that of {other}"
        findings.append(judged(examined, answer, expected, 1.0, message))
    return next((found for found in findings if not found), findings[0])


@check(any_level, unrolled)
def optimizer_state(examined: Examined) -> Finding:
    """Through momentum that was moving already: the derivative runs through the optimizer's state too."""
    problem, v = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)), normal(flat(3), examined.seed + 1)
    optimizer = torchopt.sgd(0.3, momentum=0.8)
    x, start = normal(flat(2), examined.seed), normal(flat(3), examined.seed + 2)
    warm = examined.at(problem, x=x, optimizer=optimizer, start=start, steps=2)
    where: dict[str, Any] = {"x": x, "optimizer": optimizer, "start": warm.params, "opt_state": warm.opt_state}
    examined = examined.converged
    answer = examined.answer(problem, v, **where)
    message = "the answer is not the derivative of 5 steps with momentum"
    if distance(answer.value, _momentum(problem, v, 0.3, 0.0)) < 1e-3:
        message += "; it is that of plain gradient descent: the optimizer's state was dropped"
    return judged(examined, answer, _momentum(problem, v, 0.3, 0.8), 1.0, message)


def _one_step(examined: Examined) -> str | None:
    return None if examined.claims.target == "step" else f"its target is the {examined.claims.target} derivative"


@check(any_level, settled, _one_step)
def last_step(examined: Examined) -> Finding:
    """Adam's next step from the solution, differentiated by the input."""
    problem, v = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 2, examined.seed)), normal(flat(3), examined.seed + 1)
    start = normal(flat(3), examined.seed + 2)
    ran = examined.at(problem, optimizer=torchopt.adam(0.1), start=start, steps=20)
    at = examined.at(problem, optimizer=torchopt.adam(0.1), start=ran.params, opt_state=ran.opt_state, steps=0)
    products, _, stats = examined.estimator.vjp(at, v, examined.estimator.init(at.params))
    x = at.inputs["x"].detach().requires_grad_()
    moved, _ = at.update(at.params, at.opt_state, {"x": x})
    (expected,) = torch.autograd.grad(moved, x, v)
    answer = Answer(ravel(products["x"]), 0.0, stats)
    if not examined.promises_size:
        return Finding(
            distance(unit(answer.value), unit(expected)), examined.accuracy, "it points elsewhere than Adam's step"
        )
    return judged(examined, answer, expected, 1.0, "the answer is not the derivative of one step of Adam")


def _reference(examined: Examined, problem: Matrices, at: Solved, v: Tensor, point: Tree) -> Tensor:
    """The target at a solved problem with a bent cross term, the mixed derivative taken at a point."""
    y, x, b = at.params, at.inputs["x"], problem.b
    eye = torch.eye(len(y)).to(y)
    hessian = torch.func.hessian(lambda at: problem.loss(at, {"x": x}))(y)
    slope: Tensor = torch.func.vmap(torch.func.grad(problem.bend))(point)
    u = v
    if examined.claims.target == "implicit":
        u = torch.linalg.solve(hessian + examined.damping * eye, v)
    elif examined.unrolled:  # at a solution, where 80 steps leave nothing
        u = torch.linalg.solve(hessian, v)
    return b.T @ (slope * u)


def _momentum(problem: Matrices, v: Tensor, rate: float, momentum: float) -> Tensor:
    """Σ over the steps of heavy-ball descent of Bᵀ(…)v: u ← v carried back through y ← y − rate·m, m ← momentum·m + ∇g."""
    along_y, along_m = v, torch.zeros_like(v)
    answer = torch.zeros(problem.b.shape[1]).to(v)
    for _ in range(STEPS):
        along_m = along_m - rate * along_y  # of the m that this step used
        answer = answer - problem.b.T @ along_m
        along_y = along_y + problem.a @ along_m
        along_m = momentum * along_m
    return answer


CHECKS: tuple[Check, ...] = (
    knob_without_limit,
    damping,
    reported_residual,
    cross_term_at_the_start,
    steps_counted,
    optimizer_state,
    last_step,
)
