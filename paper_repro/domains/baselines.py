"""What the third level is held against: the same pipeline with weights that nobody learned."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from paper_repro.domains.problem import Domains


def target_alone(problem: Domains) -> Tensor:
    """Train on the target's training examples alone: mean CE + μ/2 ‖φ‖²."""
    return problem.solve_finetune(problem.classifier(), problem.classifier())


BASELINES: dict[str, Callable[[Domains], Tensor]] = {
    "target alone": target_alone,
    "uniform": lambda problem: problem.pipeline(problem.logits()),
    "oracle": lambda problem: problem.pipeline(problem.oracle()),
}

MEANING = {
    "target alone": "a classifier trained on the target's training examples alone",
    "uniform": "the pipeline without the third level: all source examples weigh alike",
    "oracle": "the pipeline on the two helpful sources alone, which somebody who knows the styles has picked",
}
