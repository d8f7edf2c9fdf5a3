"""The sizes of a run, and the regularization that `tune.py` chose for each row of the table."""

from __future__ import annotations

from dataclasses import dataclass

from paper_repro.domains.problem import Settings

PRESETS: dict[str, dict[str, Settings]] = {
    "smoke": {"digits": Settings(per_source=20, train=20, valid=30, outer=4, pretrain_steps=5, finetune_steps=3)},
    "cpu": {"digits": Settings(per_source=80, train=20, valid=60, outer=24)},
}


@dataclass(frozen=True)
class Strength:
    """The two regularizers: ρ/2 ‖θ‖² of pretrain and μ/2 ‖φ − θ‖² of finetune.

    Attributes:
        decay: ρ.
        pull: μ.
    """

    decay: float
    pull: float


@dataclass(frozen=True)
class Tuned:
    """A row's regularizers.

    Attributes:
        train: while the target's training examples alone are finetuned on.
        both: in the comparison that finetunes on the validation examples too.
    """

    train: Strength
    both: Strength


TUNED: dict[str, Tuned] = {
    "target alone": Tuned(train=Strength(3e-3, 1e-4), both=Strength(3e-3, 1e-3)),
    "uniform": Tuned(train=Strength(3e-3, 1e-4), both=Strength(3e-3, 1e-3)),
    "oracle": Tuned(train=Strength(3e-3, 1.0), both=Strength(3e-3, 1e-2)),
    "cg": Tuned(train=Strength(3e-3, 1.0), both=Strength(3e-3, 1e-2)),
    "itd": Tuned(train=Strength(3e-3, 3e-1), both=Strength(3e-3, 1e-2)),
    "finite-difference": Tuned(train=Strength(3e-3, 1.0), both=Strength(3e-3, 1e-3)),
    "cg-per-example": Tuned(train=Strength(3e-3, 3e-1), both=Strength(3e-3, 1e-3)),
}
