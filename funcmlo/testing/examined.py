"""An estimator under examination: its answers, what they should be, and how near it promises to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.describe import compact
from funcmlo.hypergrad.base import BestResponse, Claims
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats
from funcmlo.multilevel import Multilevel
from funcmlo.operators import ravel
from funcmlo.testing import settings
from funcmlo.testing.by_hand import solved
from funcmlo.testing.matrices import Matrices, cross, flat, normal, symmetric

STEPS = 5
"""Inner steps of the short loops that unrolled derivatives are checked on: they are known for any number of steps."""

_ENOUGH = 24
_MOST = 4096
_SAMPLES = 16
_STILL = 1e-11
DRAWS = 32
_DEVIATIONS = 8.0
"""A mean of 32 draws is this many standard errors from its expectation less than once in 10⁸ checks (Student, 31 degrees of
freedom: 5e-9 for one entry), even if the draws were not normal by a little; its error is a norm over all entries."""


@dataclass(frozen=True)
class Answer:
    """Jᵀv as an estimator gave it.

    Attributes:
        value: laid out as one vector.
        noise: how far a mean of draws may be from its expectation; 0 for an estimator that does not draw.
        stats: the last product's stats.
    """

    value: Tensor
    noise: float = 0.0
    stats: Stats | Mapping[str, Any] | None = None

    @property
    def residual(self) -> float:
        """The residual of a solve that says it converged, to a tolerance that the user chose; 0 for any other."""
        residual = told(self.stats, "residual")
        return float(residual) if residual is not None and told(self.stats, "converged") else 0.0


def averaged(draws: Sequence[Tensor], stats: Stats | Mapping[str, Any] | None = None) -> Answer:
    """Return the mean of draws, with how far it may be from its expectation.

    Args:
        draws: independent answers.
        stats: the last one's.

    Returns:
        The answer.
    """
    drawn = torch.stack(list(draws))
    error = torch.linalg.vector_norm(drawn.std(0)) / math.sqrt(len(drawn))
    return Answer(drawn.mean(0), _DEVIATIONS * float(error), stats)


def told(stats: Any, name: str) -> Any:
    """Return a statistic, from `Stats` or from a dict; None where it is not told."""
    return stats.get(name) if isinstance(stats, Mapping) else getattr(stats, name, None)


@dataclass(frozen=True)
class Examined:
    """An estimator, and the seed of the problems that it is examined on."""

    estimator: BestResponse
    seed: int = 0
    hypergradient: Callable[..., Tree] = Multilevel.hypergradient
    """What composes hypergradients of programs: `hypergradient(program, state, batches, of=…)`."""

    @property
    def name(self) -> str:
        """The estimator as one writes it."""
        return compact(self.estimator)

    @property
    def claims(self) -> Claims:
        """What it promises."""
        return self.estimator.claims

    @property
    def own(self) -> bool:
        """Whether it answers for one level alone, so that no problem of the checks fits it."""
        return "its own level" in self.claims.assumes

    @property
    def unrolled(self) -> bool:
        """Whether it answers for the inner steps that were made, not for their solution."""
        return self.claims.target == "unrolled"

    @cached_property
    def damping(self) -> float:
        """λ, of the system (H + λI)w = v that it says it solves."""
        return sum(value for _, value in settings.dampings(self.estimator))

    @cached_property
    def sampled(self) -> bool:
        """Whether its answers differ from draw to draw where all batches are one: directions are drawn, not batches."""
        if not self.claims.stochastic or self.own:
            return self.claims.stochastic
        first, *others = (self._product(self._easy(), normal(flat(4), 1), seed=i)[0] for i in range(8))
        return not all(torch.equal(first, other) for other in others)

    @property
    def converged(self) -> Examined:
        """The estimator with its knob turned until its answer no longer changes: what its claims are about."""
        return self.turned[0]

    @cached_property
    def turned(self) -> tuple[Examined, float]:
        """The estimator with its knob turned, and by how much the last turn still changed its answer, relatively.

        Nothing is compared with the truth here. A knob that counts (iterations, terms, samples) goes up, one that measures
        (a difference's size) goes down, until the answer stands still or runs away. A count is at
        least twice the problems' dimension; who claims to be exact needs no more turning than that.
        """
        found = None if self.own else settings.knob(self.estimator)
        if found is None or isinstance(found[1], bool) or not isinstance(found[1], Real):
            return self, 0.0
        path, value = found
        counts = settings.counts(self.estimator)
        if self.sampled or self.claims.exact:
            return (self._with(path, max(_SAMPLES if self.sampled else _ENOUGH, value)) if counts else self), 0.0
        enough = _STILL if counts else 1e-7
        first = max(_ENOUGH, value) if counts else value
        best, answer = self._with(path, first), self._one(first, path)
        moved = least = math.inf
        turns = [first * 2**i for i in range(1, 13)] if counts else [first / 4**i for i in range(1, 7)]
        for value in turns:
            if counts and value > max(_MOST, 2 * first):
                break
            farther = self._one(value, path)
            moved = distance(farther, answer)
            if not moved <= 4 * least:  # it runs away, or is no longer finite
                break
            if moved <= enough:
                return best, moved
            best, answer, least = self._with(path, value), farther, min(moved, least)
        return best, moved

    def _one(self, value: Any, path: tuple[str, ...]) -> Tensor:
        return self._with(path, value)._product(self._easy(), normal(flat(4), 1))[0]

    def at_least(self, count: int) -> Examined:
        """Return the estimator with a knob that counts at no less than `count`."""
        found = settings.knob(self.estimator)
        if found is None or not settings.counts(self.estimator) or found[1] >= count:
            return self
        return self._with(found[0], count)

    @property
    def accuracy(self) -> float:
        """The relative accuracy that its claims promise, on problems whose condition is at most 10.

        To rounding if exact; a count's limit is reached to 1e-11 of the answer, times the condition; differences of a cost
        that is not quadratic keep about half of float64's digits less what the step's size leaves.
        """
        if self.claims.exact:
            return 1e-8
        return 1e-6 if settings.counts(self.estimator) else 1e-4

    @property
    def promises_size(self) -> bool:
        """Whether it promises its answer's length too, and not its direction alone."""
        return self.claims.exact or self.claims.target in {"implicit", "unrolled"} or self.claims.knob is not None

    def at(
        self,
        problem: Matrices,
        *,
        optimizer: Any = None,
        steps: int = STEPS,
        start: Tree = None,
        opt_state: Tree = None,
        batches: Feed | None = None,
        seed: int = 0,
        x: Tree = None,
    ) -> Solved:
        """Return a problem solved by hand: an unrolled estimator sees a short loop, others one that stays at the solution.

        Args:
            problem: the problem.
            optimizer: gradient descent of rate 1 without one.
            steps: inner steps.
            start: where they start; without it, a random point for unrolled estimators and the solution for others.
            opt_state: the optimizer's state there.
            batches: the batch of each step.
            seed: of the draws.
            x: the point above.

        Returns:
            The level.
        """
        x = problem.x(self.seed) if x is None else x
        if start is None:
            start = normal(problem.params_space, 2000 + self.seed) if self.unrolled else problem.solution(x)
        return solved(
            problem.loss, start, {"x": x}, self.estimator, optimizer, steps, batches=batches, opt_state=opt_state, seed=seed
        )

    def answer(self, problem: Matrices, v: Tree, **where: Any) -> Answer:
        """Return Jᵀv, the mean over draws for an estimator that draws.

        Args:
            problem: the problem.
            v: the cotangent.
            **where: as for `at`.

        Returns:
            The answer.
        """
        if not self.claims.stochastic or not (self.sampled or "batches" in where):
            value, stats = self._product(problem, v, **where)
            return Answer(value, 0.0, stats)
        seeds = range(7919 * (self.seed + 1), 7919 * (self.seed + 1) + DRAWS)
        answers = [self._product(problem, v, **{**where, "seed": seed}) for seed in seeds]
        return averaged([value for value, _ in answers], answers[-1][1])

    def program_answer(
        self, program: Multilevel, params: dict[str, Tree], batches: Mapping[str, Any] | None = None
    ) -> Answer:
        """Return a program's hypergradient of level "x", the mean over seeds for an estimator that draws.

        Args:
            program: the program, whose estimators are this one.
            params: where it stands.
            batches: its batches.

        Returns:
            The answer.
        """
        state = program.init(params)

        def once(seed: int) -> Tensor:
            return ravel(self.hypergradient(program, replace(state, seed=seed), batches or {}, of="x"))

        if not self.sampled:
            return Answer(once(0))
        return averaged([once(7919 * (self.seed + 1) + draw) for draw in range(DRAWS)])

    def target(self, problem: Matrices, v: Tree, *, steps: int = STEPS, damping: float | None = None) -> Tensor:
        """Return what Jᵀv should be on a problem whose φ is the identity, with gradient descent of rate 1.

        Args:
            problem: the problem.
            v: the cotangent.
            steps: inner steps.
            damping: λ; its own without it.

        Returns:
            −∇²_xy g (H + λI)⁻¹v, the sum of T terms Bᵀ(I − A)^k v, or Bᵀv, as it claims.
        """
        u = ravel(v).to(problem.a)
        eye = torch.eye(len(u)).to(problem.a)
        if self.claims.target == "implicit":
            u = torch.linalg.solve(problem.a + (self.damping if damping is None else damping) * eye, u)
        elif self.unrolled:
            u = sum((torch.linalg.matrix_power(eye - problem.a, k) @ u for k in range(steps)), torch.zeros_like(u))
        return problem.b.T @ u

    def _with(self, path: tuple[str, ...], value: Any) -> Examined:
        return replace(self, estimator=settings.put(self.estimator, path, value))

    def _product(self, problem: Matrices, v: Tree, **where: Any) -> tuple[Tensor, Stats | Mapping[str, Any]]:
        at = self.at(problem, **where)
        products, _, stats = self.estimator.vjp(at, v, self.estimator.init(at.params))
        return ravel(products["x"]).double(), stats

    def _easy(self) -> Matrices:
        return Matrices(symmetric(4, 10.0, self.seed), cross(4, 3, self.seed + 1))


def unit(x: Tensor) -> Tensor:
    """Return a vector's direction; zero for zero."""
    return x / (x.norm() or 1.0)


def distance(answer: Tensor, expected: Tensor) -> float:
    """Return ‖answer − expected‖ / ‖expected‖; the absolute distance from a zero."""
    size = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(answer - expected)) / (size or 1.0)
