"""Does the estimator keep to the interface: trees, dtypes, purity, the same bits, the same batch?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.hypergrad.stats import Stats
from funcmlo.operators import ravel
from funcmlo.testing.checks.base import Check, any_level, check, settled
from funcmlo.testing.examined import STEPS, Examined, distance
from funcmlo.testing.matrices import Batched, Matrices, cross, flat, normal, symmetric
from funcmlo.testing.outcome import Finding

_OFF = math.inf


def _problem(examined: Examined) -> Matrices:
    return Matrices(symmetric(4, 3.0, examined.seed), cross(4, 3, examined.seed))


@check(any_level)
def trees(examined: Examined) -> Finding:
    """Nested trees, 0-d and empty leaves, lists and tuples: the answer is a tree like each input."""
    double = torch.float64
    y = {"a": [torch.zeros(2, 1, dtype=double), (torch.zeros((), dtype=double),)], "b": torch.zeros(0, 3, dtype=double)}
    x = (torch.zeros((), dtype=double), {"c": torch.zeros(2, 2, dtype=double), "d": torch.zeros(0, dtype=double)})
    problem = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 5, examined.seed), y_like=y, x_like=x)
    v = normal(y, examined.seed)
    at = examined.at(problem)
    products, _, _ = examined.estimator.vjp(at, v, examined.estimator.init(at.params))
    if difference := _tree.mismatch(x, products["x"]):
        return Finding(_OFF, 0.0, f"an input and its cotangent differ: {difference}")
    examined, told = examined.converged, "the answer on nested trees is another than on vectors"
    plain = Matrices(problem.a, problem.b)
    answer, flat_answer = (
        examined.answer(p, w, x=at) for p, w, at in ((problem, v, problem.x()), (plain, ravel(v), ravel(problem.x())))
    )
    size = float(flat_answer.value.norm()) or 1.0
    allowed = examined.accuracy + 3 * (answer.residual + flat_answer.residual) + (answer.noise + flat_answer.noise) / size
    return Finding(distance(answer.value, flat_answer.value), allowed, told)


@check(any_level)
def dtypes(examined: Examined) -> Finding:
    """float32 parameters below, one float32 and one float64 leaf above: each cotangent has its input's dtype."""
    y = torch.zeros(3)
    x = {"single": torch.zeros(2), "double": torch.zeros(1, dtype=torch.float64)}
    problem = Matrices(symmetric(3, 3.0, examined.seed), cross(3, 3, examined.seed), y_like=y, x_like=x)
    above = problem.x(examined.seed)
    at = examined.at(problem, x=above, start=normal(y, examined.seed))
    products, _, _ = examined.estimator.vjp(at, normal(y, examined.seed + 1), examined.estimator.init(at.params))
    if difference := _tree.mismatch(above, products["x"]):
        return Finding(_OFF, 0.0, f"an input and its cotangent differ: {difference}")
    if examined.claims.stochastic or not examined.promises_size:
        return Finding(0.0, 0.0, "")
    examined = examined.converged
    v = normal(y, examined.seed + 1)
    answer, expected = examined.answer(problem, v, x=above), examined.target(problem, v)
    # A difference keeps half of float32's digits: 3e-4, a condition of 3, and a factor of ten to spare.
    return Finding(distance(answer.value, expected), 1e-2, "the answer in float32 is another than in float64")


@check(any_level)
def zero_cotangent(examined: Examined) -> Finding:
    """L(0) = 0, and no division by its norm."""
    at = examined.at(_problem(examined))
    products, _, _ = examined.estimator.vjp(at, _tree.zeros_like(at.params), examined.estimator.init(at.params))
    return Finding(float(_tree.norm(products["x"])), 0.0, "the answer to a zero cotangent is not zero")


@check(any_level)
def repeatable(examined: Examined) -> Finding:
    """The same call gives the same bits, whatever was drawn elsewhere meanwhile."""
    at = examined.at(_problem(examined))
    v = normal(at.params, examined.seed + 1)
    answers = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            answers.append(ravel(examined.estimator.vjp(at, v, examined.estimator.init(at.params))[0]["x"]))
    apart = float((answers[0] - answers[1]).abs().max()) if not torch.equal(*answers) else 0.0
    return Finding(
        apart, 0.0, "two calls with the same arguments differ: draw from solved.seed, not from the global generator"
    )


@check(any_level)
def global_random_state(examined: Examined) -> Finding:
    """Torch's default generator stands where it stood."""
    at = examined.at(_problem(examined))
    before = torch.get_rng_state()
    examined.estimator.vjp(at, normal(at.params, 1), examined.estimator.init(at.params))
    moved = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    return Finding(float(moved), 0.0, "torch's default generator was moved on; use a torch.Generator seeded by solved.seed")


@check(any_level)
def global_settings_changed(examined: Examined) -> Finding:
    """Grad mode and torch's default dtype are as they were."""
    at = examined.at(_problem(examined))
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    examined.estimator.vjp(at, normal(at.params, 1), examined.estimator.init(at.params))
    after = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    return Finding(float(before != after), 0.0, f"(grad mode, default dtype) were {before} and are {after} after a call")


@check(any_level)
def changed_in_place(examined: Examined) -> Finding:
    """Nothing that is handed in is written to."""
    at = examined.at(_problem(examined))
    v, state = normal(at.params, 1), examined.estimator.init(at.params)
    handed = {"the solution": at.params, "an input": at.inputs, "the cotangent": v, "the estimator's state": state}
    handed |= {"the optimizer's state": at.opt_state, "the loop's start": at.init}
    before = {name: _fingerprint(tree) for name, tree in handed.items()}
    examined.estimator.vjp(at, v, state)
    changed = [name for name, tree in handed.items() if _fingerprint(tree) != before[name]]
    return Finding(float(len(changed)), 0.0, f"changed in place: {', '.join(changed)}")


@check(any_level, settled)
def batch_resampled(examined: Examined) -> Finding:
    """All evaluations are of the inner loop's batches: those that come after them change nothing."""
    batch, other = ({"a": symmetric(3, 3.0, s), "b": cross(3, 2, s)} for s in (examined.seed, examined.seed + 9))
    problem, start, v = Batched(batch["a"], batch["b"]), normal(flat(3), examined.seed), normal(flat(3), examined.seed + 1)
    answers = []
    for after in (batch, other):
        at = examined.at(problem, start=start, batches=lambda t, after=after: batch if t < STEPS else after)
        answers.append(ravel(examined.estimator.vjp(at, v, examined.estimator.init(at.params))[0]["x"]))
    told = "the answer depends on batches after the last step's: a loss was evaluated with draw=…"
    return Finding(distance(answers[1], answers[0]), 0.0, told)


@check(any_level)
def nan_hidden(examined: Examined) -> Finding:
    """A NaN in the mixed derivative, or in the curvature that is inverted, is in the answer or an error, never a number."""
    curvature, mixed = symmetric(4, 3.0, examined.seed), cross(4, 3, examined.seed)
    nan = torch.zeros(4, 4, dtype=torch.float64)
    nan[0, 0] = math.nan
    problems = {"mixed derivative": Matrices(curvature, mixed + nan[:, :3])}
    if examined.claims.target in {"implicit", "unrolled"}:
        problems["curvature"] = Matrices(curvature + nan, mixed)
    for what, problem in problems.items():
        if (found := _of_nan(examined, problem)) is not None and bool(torch.isfinite(found[0])):
            return Finding(1.0, 0.0, f"the cost's {what} has a NaN, and the answer is {found[0]:.3g}")
    return Finding(0.0, 0.0, "")


def _of_nan(examined: Examined, problem: Matrices) -> Tensor | None:
    """The answer to a problem with a NaN; None for an error that says so."""
    start = normal(flat(4), examined.seed)
    try:
        at = examined.at(problem, start=start)
        return ravel(examined.estimator.vjp(at, normal(flat(4), 1), examined.estimator.init(at.params))[0]["x"])
    except Exception:  # an error is an answer, whose ever it is
        return None


@check(any_level)
def stats(examined: Examined) -> Finding:
    """The third value that comes back is `fm.Stats` or a dict, its residual a number from 0 on."""
    at = examined.at(_problem(examined))
    returned = examined.estimator.vjp(at, normal(at.params, 1), examined.estimator.init(at.params))
    if not isinstance(returned, tuple) or len(returned) != 3:
        return Finding(_OFF, 0.0, f"expected (cotangents, state, stats); {type(returned).__name__} came")
    told = returned[2]
    if not isinstance(told, (Stats, Mapping)):
        return Finding(_OFF, 0.0, f"expected fm.Stats(…) or a dict; {type(told).__name__} came")
    residual = told.residual if isinstance(told, Stats) else told.get("residual")
    wrong = residual is not None and not 0.0 <= float(residual) < math.inf
    return Finding(float(wrong), 0.0, f"the residual {residual} is none")


@check(any_level, settled)
def state_carried(examined: Examined) -> Finding:
    """Called again with the state that it returned, the estimator answers to another cotangent as well as at first."""
    problem = _problem(examined)
    at = examined.at(problem)
    examined = examined.converged
    state = examined.estimator.init(at.params)
    u, v = (normal(flat(4), examined.seed + i) for i in range(2))
    _, state, _ = examined.estimator.vjp(at, u, state)
    products, _, _ = examined.estimator.vjp(at, v, state)
    fresh = examined.answer(problem, v)
    allowed = 2 * examined.accuracy + (6 * fresh.residual if fresh.residual < 1e-2 else 0.0)
    return Finding(distance(ravel(products["x"]), fresh.value), allowed, "the answer depends on the call before it")


def _fingerprint(tree: Tree) -> list[tuple[int, bytes]]:
    leaves = [x for x in _tree.leaves(tree) if isinstance(x, Tensor)]
    return [(x._version, x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()) for x in leaves]


CHECKS: tuple[Check, ...] = (
    trees,
    dtypes,
    zero_cotangent,
    repeatable,
    global_random_state,
    global_settings_changed,
    changed_in_place,
    batch_resampled,
    nan_hidden,
    stats,
    state_carried,
)
