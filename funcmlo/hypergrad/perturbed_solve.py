"""Perturbed inner solves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.once import once
from funcmlo.hypergrad.sampling import (
    DISTRIBUTIONS,
    Distribution,
    check_settings,
    check_steps,
    mean_product,
    run_again,
)
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats


@dataclass(frozen=True)
class PerturbedSolve(BestResponse):
    """Jᵀv ≈ 1/b Σ_i ⟨v, (y(x + μu_i) − y(x)) / μ⟩ u_i: PZOBO, the inner run made again at perturbed inputs.

    No derivative is taken but those that the inner steps take themselves, so a step may hold what cannot be
    differentiated. y(x) is the run that was made, with the same batches, draws and start.

    Two errors add up. The difference is off by O(μ), or by O(μ²) with `central=True`, and by rounding of O(ε/μ) for the
    machine epsilon ε. Sampling is unbiased for what the difference converges to; with a = Jᵀv it adds a mean square
    error of (N + 1) ‖a‖² / b for Gaussian u and (N − 1) ‖a‖² / b for signs.

    Cost: b inner runs (2b with `central=True`), mapped together. Memory: `chunk` runs, whatever their length.

    The draws follow from the program's seed, the level, its step and `seed`: a call repeats to the bit, and outer
    steps draw anew. (`argmin` and `fixed_point` have no steps to count: there every call has the same draws.) Programs
    mapped by `torch.func.vmap` share them.

    Args:
        samples: b, the number of directions.
        scale: μ itself, whatever the sizes of x and of N: u has N entries of variance 1, so x moves by about μ√N. None
            chooses μ√N = ε^(1/2) (1 + ‖x‖), or ε^(1/3) (1 + ‖x‖) with `central=True`, for ε of the coarsest dtype among
            the level and its inputs, all inputs together.
        seed: of the draws.
        distribution: of the entries of u: `"gaussian"`, as in the paper, or `"rademacher"`, signs, whose variance is less.
        central: whether the difference is [y(x + μu) − y(x − μu)] / 2μ.
        chunk: how many samples are mapped by `torch.func.vmap` together; None for all of them, 1 for a plain loop, for
            losses that cannot be mapped. The draws are the same.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        One step from 0 on (y − x)²/2 with rate 1/2 gives y = x/2, and signs of one number are exact:

        >>> import torch, torchopt, funcmlo as fm
        >>> response = PerturbedSolve(1, scale=0.5, distribution="rademacher")
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=response),
        ...     fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(3), "x": torch.tensor(2.0)})
        >>> program.hypergradient(state, {}, of="x")
        tensor(1.5000)

    References:
        Sow, Ji and Liang 2022 (PZOBO), arXiv 2110.07004; Nesterov and Spokoiny 2017 for the sampling.
    """

    samples: int
    scale: float | None = None
    seed: int = 0
    distribution: Distribution = "gaussian"
    central: bool = False
    chunk: int | None = None

    shares_samples: ClassVar[bool] = True
    requires: ClassVar[Requires] = "replay"
    claims: ClassVar[Claims] = Claims(target="unrolled", exact=False, stochastic=True, knob="samples", assumes=frozenset())
    second_order: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check_settings("PerturbedSolve", self.samples, self.seed, self.chunk)
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if self.scale is not None and not (number and 0 < self.scale < math.inf):
            raise DefinitionError(f"PerturbedSolve(scale={self.scale!r}): expected a positive number, or None to choose it.")
        if self.distribution not in tuple(DISTRIBUTIONS):
            raise DefinitionError(
                f"PerturbedSolve(distribution={self.distribution!r}): expected 'gaussian' or 'rademacher'."
            )
        if not isinstance(self.central, bool):
            raise DefinitionError(f"PerturbedSolve(central={self.central!r}): expected True or False.")

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return the mean of ⟨v, (y(x + μu) − y(x)) / μ⟩ u for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: no inner steps were made.
        """
        check_steps("PerturbedSolve", solved)
        with torch.no_grad():
            mu = self._step(solved, cotangent)

            def product(u: dict[str, Tree]) -> Tensor:
                ahead = run_again(solved, _tree.add_scaled(solved.inputs, mu, u))
                behind = run_again(solved, _tree.add_scaled(solved.inputs, -mu, u)) if self.central else solved.params
                return _tree.dot(cotangent, _tree.subtract(ahead, behind)) / (2 * mu if self.central else mu)

            products = mean_product(
                product,
                solved,
                cotangent,
                samples=self.samples,
                distribution=self.distribution,
                seed=self.seed,
                chunk=self.chunk,
            )
        products = once("PerturbedSolve", products, (cotangent, solved.params, solved.inputs))
        replayed = (2 if self.central else 1) * self.samples * solved.steps
        # A step of an iterated map takes no gradient.
        gradients = replayed if solved.condition is None else 0
        return products, state, Stats(replayed=replayed, gradients=gradients)

    def _step(self, solved: Solved, v: Tree) -> Tensor:
        """μ, a 0-d tensor."""
        x_norm = _tree.norm(solved.inputs)
        if self.scale is not None:
            return torch.full_like(x_norm, self.scale)
        root = math.pow(solved.epsilon(v), 1 / 3 if self.central else 1 / 2)
        return root * (1 + x_norm) / math.sqrt(max(_tree.size(solved.inputs), 1))
