"""The forward gradient of the unrolled inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcmlo import _forward, _tree
from funcmlo._tree import Tree
from funcmlo.hypergrad.base import BestResponse, Claims, Requires
from funcmlo.hypergrad.once import once
from funcmlo.hypergrad.sampling import check_settings, check_steps, mean_product, run_again
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats


@dataclass(frozen=True)
class ForwardGradient(BestResponse):
    """Jᵀv ≈ 1/b Σ_i ⟨v, J r_i⟩ r_i with signs r_i ∈ {±1}^N: (FG)²U, unbiased for the unrolled inner loop.

    Each J r is one forward-mode product through the inner steps from their start, so nothing of the steps is kept.
    With a = Jᵀv the mean square error is E ‖answer − a‖² = (N − 1) ‖a‖² / b: for N = 1 a single sample is exact, and for
    large N the answer is a direction that has to be averaged over samples or over outer steps.

    Cost: b inner runs in forward mode, mapped together; the run itself is made once a chunk. Memory: one inner step with
    `chunk` tangents, whatever T and however large J.

    The draws follow from the program's seed, the level, its step and `seed`: a call repeats to the bit, and outer
    steps draw anew. (`argmin` and `fixed_point` have no steps to count: there every call has the same draws.) Programs
    mapped by `torch.func.vmap` share them.

    Everything in the inner steps must have a forward-mode derivative; the solution of an `argmin` in the loss has none.

    Args:
        samples: b, the number of directions.
        seed: of the draws.
        chunk: how many samples are mapped by `torch.func.vmap` together; None for all of them, 1 for a plain loop, for
            losses that cannot be mapped. The draws are the same.

    Raises:
        DefinitionError: a setting is out of its range.

    Example:
        With one number above, r² = 1, and one sample is exact: one step from 0 on (y − x)²/2 with rate 1/2 gives y = x/2.

        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum() / 2, torchopt.sgd(0.5), response=ForwardGradient(1)),
        ...     fm.Level("x", lambda x, y: y.sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(3), "x": torch.tensor(2.0)})
        >>> program.hypergradient(state, {}, of="x")
        tensor(1.5000)

    References:
        Shen, Wang and Yang 2024, arXiv 2406.14095; Baydin et al. 2022, arXiv 2202.08587.
    """

    samples: int
    seed: int = 0
    chunk: int | None = None

    shares_samples: ClassVar[bool] = True
    requires: ClassVar[Requires] = "replay"
    claims: ClassVar[Claims] = Claims(target="unrolled", exact=False, stochastic=True, knob="samples", assumes=frozenset())

    def __post_init__(self) -> None:
        """Refuse settings without a meaning."""
        check_settings("ForwardGradient", self.samples, self.seed, self.chunk)

    def vjp(self, solved: Solved, cotangent: Tree, state: Any) -> tuple[dict[str, Tree], Any, Stats]:
        """Return the mean of ⟨v, Jr⟩ r for every input.

        Args:
            solved: the lower level at its solution.
            cotangent: v, a tree like `solved.params`.
            state: passed through.

        Returns:
            The cotangents by input name, the state, and the stats.

        Raises:
            EstimatorError: no inner steps were made, or something in them has no forward-mode derivative.
        """
        check_steps("ForwardGradient", solved)

        def product(r: dict[str, Tree]) -> Tensor:
            return _tree.dot(cotangent, _forward.jvp(lambda x: run_again(solved, x), solved.inputs, r))

        with torch.no_grad():
            products = mean_product(
                product,
                solved,
                cotangent,
                samples=self.samples,
                distribution="rademacher",
                seed=self.seed,
                chunk=self.chunk,
            )
        products = once("ForwardGradient", products, (cotangent, solved.params, solved.inputs))
        return products, state, Stats(steps=self.samples * solved.steps)
