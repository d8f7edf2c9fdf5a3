"""Who is asked, and how its knobs are tried."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.course import Settings

Linear = Literal["products", "series", "tolerance", "none"]

STEPS = (5, 8, 10, 12, 15, 18, 22, 26, 30, 35, 40, 45, 50, 60, 70, 80, 100, 130, 160, 200, 250, 300, 400)
LINEAR: dict[Linear, Sequence[float]] = {
    "products": (10, 15, 20, 25, 30, 35, 40, 45, 50, 60, 70, 80, 100, 130),
    "series": (500, 1000, 2000, 3000, 4000, 6000, 8000),
    "tolerance": (3e-3, 2e-3, 1e-3, 7e-4, 5e-4, 3e-4, 2e-4, 1e-4, 3e-5),
    "none": (0,),
}
"""The second knob's values by its kind, the coarsest first."""


@dataclass(frozen=True)
class Knobs:
    """What a user tunes.

    Attributes:
        steps: inner steps for each outer step.
        linear: products, terms of the series, or the tolerance; 0 where there is no such knob.
    """

    steps: int
    linear: float


Answer = Callable[[Tensor, int], Tensor]
"""(weights, inner steps) → the hypergradient there; the classifier goes on from where it stopped."""


@dataclass(frozen=True)
class Contender:
    """One method of one library.

    Attributes:
        name: on the command line and in the table.
        library: the distribution's name for pip; None for code of this folder.
        adapter: the module of this folder that makes it.
        linear: what its second knob is.
        inner: its inner optimizer, "momentum" for all but those that say otherwise.
        counted: whether it is one of the torch peers that the figure is about.
    """

    name: str
    library: str | None
    adapter: str
    linear: Linear
    inner: str = "momentum"
    counted: bool = True

    @property
    def installed(self) -> bool:
        """Whether its library is."""
        if self.library is None:
            return True
        try:
            importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return False
        return True

    def start(self, problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
        """Return it ready for the first outer step.

        Args:
            problem: the data and costs.
            settings: the rates.
            knobs: its knobs.

        Returns:
            What answers, one outer step after the other.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old libraries use torch's old names
            module = importlib.import_module(f"paper_repro.peers_accuracy.{self.adapter}")
        made: Answer = module.METHODS[self.name](problem, settings, knobs)
        return made


CONTENDERS: dict[str, Contender] = {
    one.name: one
    for one in (
        Contender("by-hand", None, "by_hand", "products"),
        Contender("by-hand-lbfgs", None, "by_hand", "products", inner="torch.optim.LBFGS", counted=False),
        Contender("betty-neumann", "betty-ml", "with_betty", "series"),
        Contender("torchopt-cg", "torchopt", "with_torchopt", "products"),
        Contender("torchopt-neumann", "torchopt", "with_torchopt", "series"),
        Contender("torchopt-itd", "torchopt", "with_torchopt", "none"),
        Contender("boat-cg", "boat-torch", "with_boat", "products"),
        Contender("higher-itd", "higher", "with_higher", "none"),
        Contender("jax-jit", "jax", "with_jax", "products", counted=False),
        Contender("funcmlo-cold", "funcmlo", "with_funcmlo", "products", counted=False),
        Contender("funcmlo-momentum", "funcmlo", "with_funcmlo", "tolerance", counted=False),
        Contender("funcmlo-compiled", "funcmlo", "with_funcmlo", "tolerance", counted=False),
        Contender("funcmlo", "funcmlo", "with_funcmlo", "tolerance", inner="quasi-Newton", counted=False),
    )
}
