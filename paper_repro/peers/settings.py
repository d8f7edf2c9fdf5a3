"""What can be changed by `--set`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from paper_repro.peers.workloads import ESTIMATORS

LEAST = 3
"""The least number of rounds, whatever they take."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        sizes: of the workloads, "cpu" or "smoke".
        rounds: how many turns each contender takes at most, and
        seconds: how long all turns of one hypergradient may take before no further round begins, at least `LEAST`.
        threads: how many threads and cores each process has.
        products: of CG and Neumann.
        itd: whether the differentiated inner steps are measured.
        cg: whether conjugate gradient is.
        neumann: whether the Neumann series is.
        difference: whether the finite difference is.
        memory: whether peaks are measured, in processes of their own.
        contenders: who is asked; the command line's `--methods`.
    """

    sizes: str = "cpu"
    rounds: int = 9
    seconds: float = 60.0
    threads: int = 2
    products: int = 10
    itd: bool = True
    cg: bool = True
    neumann: bool = True
    difference: bool = True
    memory: bool = True
    contenders: tuple[str, ...] = ()

    @property
    def estimators(self) -> tuple[str, ...]:
        """The names of the hypergradients that are measured."""
        return tuple(name for name in ESTIMATORS if getattr(self, name))


assert {field.name for field in fields(Settings)} >= set(ESTIMATORS)
