"""Who is measured: libraries and variants by their names on the command line, and what each has to offer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from paper_repro.peers.workloads import ESTIMATORS, Workload


@dataclass(frozen=True)
class Contender:
    """One way to compute hypergradients.

    Attributes:
        name: on the command line.
        kind: "peer" for what runs on torch, by hand included; "jax"; "own" for this library; "beside" for what is compared
            with nobody.
        adapter: the module of this folder whose `prepare` makes its function; it is imported in a process of its own.
        module: what must be importable for it; None for nothing.
        distribution: its name for pip, for its version.
        variant: what `prepare` is told.
        estimators: which hypergradients it has.
        missing: why it has not the others, by estimator; "tasks" for workloads with tasks, "alone" for those without.
    """

    name: str
    kind: str
    adapter: str
    module: str | None = None
    distribution: str | None = None
    variant: str = ""
    estimators: tuple[str, ...] = ESTIMATORS
    missing: Mapping[str, str] = field(default_factory=dict)

    def installed(self) -> bool:
        """Return whether its module can be found, which is not imported for it."""
        return self.module is None or importlib.util.find_spec(self.module) is not None

    def version(self) -> str | None:
        """Return its version; None if it is not installed, "" for code of this folder."""
        if self.distribution is None:
            return ""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def refusal(self, workload: Workload, estimator: str) -> str | None:
        """Return why it is not asked for a hypergradient of a workload; None if it is."""
        if not self.installed():
            return f"{self.module} is not installed"
        kind = "tasks" if workload.tasks else "alone"
        if kind in self.missing:
            return self.missing[kind]
        if estimator not in self.estimators:
            return self.missing.get(estimator, "it has none")
        return None


_NO_UNROLL = "its iterative problems raise with this torch (see peers_correctness/README.md)"
_NO_TASKS = "measured without tasks"
_ONLY_ITD = "a way to run ITD"


def _modes(name: str, kind: str, adapter: str, variant: str, module: str | None = None) -> Contender:
    missing = dict.fromkeys(ESTIMATORS[1:], _ONLY_ITD) | {"tasks": _NO_TASKS}
    distribution = {"jax": "jax", "own": "funcmlo"}.get(kind)
    return Contender(name, kind, adapter, module, distribution, variant, ("itd",), missing)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("by-hand", "peer", "by_hand"),
        _modes("by-hand-recompute", "peer", "by_hand", "recompute"),
        Contender("by-hand-vmap", "beside", "by_hand", variant="vmap", missing={"alone": "there are no tasks to map"}),
        Contender(
            "betty", "peer", "with_betty", "betty", "betty-ml", estimators=ESTIMATORS[1:],
            missing={"itd": _NO_UNROLL, "tasks": _NO_UNROLL},
        ),
        Contender("higher", "peer", "with_higher", "higher", "higher", estimators=("itd",)),
        Contender("torchopt", "peer", "with_torchopt", "torchopt", "torchopt", estimators=("itd", "cg", "neumann")),
        Contender("boat", "peer", "with_boat", "boat_torch", "boat-torch"),
        Contender("jax", "jax", "with_jax", "jax", "jax"),
        _modes("jax-checkpoint", "jax", "with_jax", "checkpoint", "jax"),
        Contender("funcmlo", "own", "with_funcmlo", distribution="funcmlo"),
        _modes("funcmlo-recompute", "own", "with_funcmlo", "recompute"),
        _modes("funcmlo-mixed", "own", "with_funcmlo", "mixed"),
        _modes("funcmlo-checkpoint", "own", "with_funcmlo", "checkpoint"),
        Contender("funcmlo-compiled", "own", "with_funcmlo", distribution="funcmlo", variant="compiled"),
        Contender("funcmlo-whole", "own", "with_funcmlo", distribution="funcmlo", variant="whole"),
    )
}  # fmt: skip
