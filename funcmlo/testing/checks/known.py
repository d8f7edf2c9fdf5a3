"""Does an estimator give the hypergradients that are known?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchopt

from funcmlo._tree import Tree
from funcmlo.hypergrad.stats import Stats
from funcmlo.level import Level
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel
from funcmlo.testing.checks.base import Check
from funcmlo.testing.examined import Answer, Examined, distance
from funcmlo.testing.known import Bilevel, Known
from funcmlo.testing.outcome import Finding


def known_checks(problems: Sequence[Known], *, own: bool = False) -> tuple[Check, ...]:
    """Return a check for each problem, named after it.

    Args:
        problems: the problems.
        own: whether they are the level that the estimator was made for.

    Returns:
        The checks.
    """

    def one(problem: Known, name: str) -> Check:
        return Check(name, lambda e: known(e, problem), lambda e: _skip(e, problem, own))

    return tuple(one(problem, name) for problem, name in zip(problems, _names(problems), strict=True))


def known(examined: Examined, problem: Known) -> Finding:
    """Compare the hypergradient of a problem with the known one."""
    examined = examined.converged
    if isinstance(problem, Bilevel) and not examined.claims.exact:  # as many terms as gradient descent has steps
        examined = examined.at_least(problem.steps)
    expected = ravel(problem.hypergradient())
    told = None
    if isinstance(problem, Bilevel):
        found, told = _by_program(examined, problem)
    else:
        found = torch.func.grad(problem.objective(examined.estimator))(problem.x)
    answer = Answer(ravel(found), 0.0, told)
    size = float(expected.norm()) or 1.0
    # An inner loop leaves 1e-12 of its way; between that, or a residual, and the answer lies a condition of up to 100.
    allowed = max(1e-8, 10 * examined.accuracy) + 100 * min(answer.residual, 1e-4)
    message = f"the hypergradient of {problem!r} is off by {distance(answer.value, expected):.2g} of {size:.2g}"
    return Finding(distance(answer.value, expected), allowed, message)


def _names(problems: Sequence[Known]) -> list[str]:
    """A name for each problem; of several of one class, the later ones are numbered."""
    names: list[str] = []
    for problem in problems:
        name, earlier = f"known_{problem.name}", sum(other.name == problem.name for other in problems[: len(names)])
        names.append(f"{name}_{earlier + 1}" if earlier else name)
    return names


def _by_program(examined: Examined, problem: Bilevel) -> tuple[Tree, Stats | None]:
    """The hypergradient by a program whose inner cost is scaled so that descent of rate 1 converges, if any does."""

    def scaled(y: Tree, x: Tree) -> Tree:
        return problem.rate * problem.inner(y, x)

    plain = type(problem).optimizer is Bilevel.optimizer
    cost, optimizer = (scaled, torchopt.sgd(1.0)) if plain else (problem.inner, problem.optimizer)
    lower = Level("y", cost, optimizer, steps=problem.steps, response=examined.estimator)
    program = Multilevel(lower, Level("x", problem.outer, torchopt.sgd(0.1)))
    state = program.init({"y": problem.start, "x": problem.x})
    if examined.hypergradient is not Multilevel.hypergradient:
        return examined.hypergradient(program, state, {}, of="x"), None
    found, stats = program.hypergradient(state, {}, of="x", with_stats=True)
    told = stats["y"]
    return found, told if isinstance(told, Stats) else None


def _skip(examined: Examined, problem: Known, own: bool) -> str | None:
    claims = examined.claims
    if claims.target in {"identity", "step"}:
        return f"its target is the {claims.target} formula, not the hypergradient"
    if examined.sampled:
        return "it draws directions, and is judged on short loops"
    missing = claims.assumes - problem.assumptions - ({"its own level"} if own else set())
    if missing:
        return f"it assumes what the problem does not meet: {', '.join(sorted(missing))}"
    if (
        examined.estimator.requires == "trajectory"
        and not isinstance(problem, Bilevel)
        and not examined.estimator.in_the_open
    ):
        return "a fixed point keeps no trajectory"
    if examined.damping:
        return "its damping is a bias here"
    return None
