"""A level run by hand, outside any program: what an estimator sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchopt
from torch import Tensor

from funcmlo._tree import Tree
from funcmlo.batches import Feed
from funcmlo.binding import no_batch
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.solved import Solved
from funcmlo.level import Level
from funcmlo.problem import Problem
from funcmlo.unroll import run


def solved(
    loss: Callable[..., Any],
    params: Tree,
    inputs: dict[str, Tree],
    response: BestResponse,
    optimizer: Any = None,
    steps: int = 0,
    *,
    batches: Feed | None = None,
    opt_state: Tree = None,
    seed: int = 0,
) -> Solved:
    """Run a level's inner loop and return the `Solved` that its estimator would see.

    Args:
        loss: `loss(params, inputs)`, with a dict of inputs, or `loss(params, inputs, batch)` with `batches`.
        params: where the loop starts; without steps, the solution.
        inputs: the parameters of the levels above, by name.
        response: the estimator, which says what is to be kept of the loop.
        optimizer: a torchopt transformation; gradient descent of rate 1 without one.
        steps: inner steps.
        batches: the batch of each step, a function of its number `t`.
        opt_state: the optimizer's state at the start; None for its first.
        seed: of a loss's random draws.

    Returns:
        The level at its solution.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> cg = fm.AID(fm.CG(5))
        >>> at = fm.testing.solved(lambda y, x: (y * y - y * x["x"]).sum(), torch.ones(2), {"x": 2 * torch.ones(2)}, cg)
        >>> products, state, stats = cg.vjp(at, torch.ones(2), None)
        >>> products["x"]
        tensor([0.5000, 0.5000])
    """
    names = list(inputs)

    def cost(own: Tree, *trees: Tree) -> Tensor:
        value: Tensor = loss(own, dict(zip(names, trees, strict=True)))
        return value

    def batched(own: Tree, batch: Any, *trees: Tree) -> Tensor:
        value: Tensor = loss(own, dict(zip(names, trees, strict=True)), batch)
        return value

    reads = {name: name for name in names}
    chosen = batched if batches else cost
    level = Level("lower", chosen, optimizer or torchopt.sgd(1.0), steps=steps, response=response, reads=reads)
    feed = batches or no_batch
    problem = Problem(level, feed, seed=seed, first=0)
    standing = (params, level.optimizer_for(inputs).init(params) if opt_state is None else opt_state)
    return run(problem, standing, inputs, steps, response.requires, response.keep(steps)).solved
