"""What estimators that probe an inner loop in random directions share: the loop, the draws, and the mean.

For a random r with E r = 0 and E rrᵀ = I, and a linear map r ↦ ⟨a, r⟩ that can be evaluated but whose vector a cannot be
seen, E ⟨a, r⟩ r = a: here a = Jᵀv and ⟨a, r⟩ = ⟨v, Jr⟩. All inputs are probed by one r together; what they add to each
other's products is zero in expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from funcmlo import _random, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError, EstimatorError
from funcmlo.hypergrad.solved import Solved
from funcmlo.linear.checks import check_iterations

Distribution = Literal["gaussian", "rademacher"]

DISTRIBUTIONS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    "gaussian": lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float32),
    "rademacher": lambda shape, generator: 2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0,
}


def check_settings(owner: str, samples: Any, seed: Any, chunk: Any) -> None:
    """Raise unless a sampling estimator's settings have a meaning.

    Args:
        owner: the estimator's name, for the message.
        samples: what the user gave for the number of samples.
        seed: what the user gave for the seed.
        chunk: what the user gave for the number of samples at a time.

    Raises:
        DefinitionError: one has none.
    """
    check_iterations(owner, samples, "samples")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise DefinitionError(f"{owner}(seed={seed!r}): expected an integer.")
    if chunk is not None:
        check_iterations(owner, chunk, "chunk")


def check_steps(owner: str, solved: Solved) -> None:
    """Raise unless inner steps were made.

    Args:
        owner: the estimator's name, for the message.
        solved: the lower level at its solution.

    Raises:
        EstimatorError: there are none to follow.
    """
    if not solved.steps:
        raise EstimatorError(
            f"{owner} follows the inner steps, but none were made (steps=0 or solve=False); use AID, which needs the "
            "solution alone, or solve the lower level."
        )


def run_again(solved: Solved, inputs: dict[str, Tree]) -> Tree:
    """Return y_T(x), where the inner loop ends when it is run from its start with these inputs.

    Args:
        solved: the lower level at its solution.
        inputs: x.

    Returns:
        A tree like `solved.params`.
    """
    y, s = solved.start(inputs)
    for t in range(solved.steps):
        y, s = solved.update(y, s, inputs, t)
    return y


def mean_product(
    product: Callable[[dict[str, Tree]], Tensor],
    solved: Solved,
    cotangent: Tree,
    *,
    samples: int,
    distribution: Distribution,
    seed: int,
    chunk: int | None,
) -> dict[str, Tree]:
    """Return the mean over samples of product(r) · r.

    Args:
        product: r ↦ ⟨v, Jr⟩, a 0-d tensor; r is a tree like the inputs.
        solved: the lower level at its solution.
        cotangent: v; where it is zero the mean is exactly zero, whatever the products are.
        samples: the number of draws.
        distribution: what the entries of r are drawn from.
        seed: the estimator's own seed; the draws follow from it and from the level's.
        chunk: how many samples are mapped by `torch.func.vmap` together; None for all of them, 1 for a plain loop.

    Returns:
        The mean, a tree like the inputs.
    """
    leaves, structure = _tree.flatten(solved.inputs)
    if not _tree.size(solved.inputs) or not _tree.size(solved.params):
        return {name: _tree.zeros_like(tree) for name, tree in solved.inputs.items()}
    generator = torch.Generator().manual_seed(_random.step_seed(solved.seed, distribution, seed))

    def draw(count: int) -> list[Tensor]:
        """`count` directions, drawn one after the other, so that they do not depend on how they are grouped."""
        rows = [[DISTRIBUTIONS[distribution](x.shape, generator) for x in leaves] for _ in range(count)]
        return [torch.stack(column).to(x.device, x.dtype) for column, x in zip(zip(*rows, strict=True), leaves, strict=True)]

    def along(*direction: Tensor) -> Tensor:
        return product(_tree.unflatten(structure, direction))

    total = [torch.zeros_like(x, dtype=_tree.precision(x)) for x in leaves]
    together = samples if chunk is None else chunk
    sharing = solved.sharing if solved.sharing is not None and solved.sharing.kind == "samples" else None
    for first in range(0, samples, together):
        # Under a map a draw would be refused, or be another one for each of what is mapped.
        r = _tracing.call_outside(draw, min(together, samples - first))
        if sharing is not None:
            r = [x[(sharing.rank - first) % sharing.size :: sharing.size] for x in r]
        count = len(r[0])
        if not count:
            continue
        with _mapped():
            if count > 1 and not _tracing.mapping():  # torch's forward derivatives are wrong under two maps: see forward.py
                products = torch.func.vmap(along, randomness="same")(*r)
            else:
                products = torch.stack([along(*(x[i] for x in r)) for i in range(count)])
        for i, x in enumerate(r):
            weights = products.to(x.device, total[i].dtype).reshape(count, *[1] * (x.dim() - 1))
            total[i] = total[i] + (weights * x).sum(0)
    if sharing is not None:
        total = sharing.total(total)
    mean = _tree.unflatten(structure, [(t / samples).to(x.dtype) for t, x in zip(total, leaves, strict=True)])
    answer: dict[str, Tree] = _tree.where(_tree.is_zero(cotangent), _tree.zeros_like(mean), mean)
    return answer


@contextmanager
def _mapped() -> Generator[None]:
    """Say what to do about a loss that cannot be mapped."""
    try:
        yield
    except EstimatorError:
        raise
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise EstimatorError(
            f"the samples cannot be mapped together by torch.func.vmap ({str(error).splitlines()[0][:120]}); give chunk=1, "
            "which takes them one by one."
        ) from error
