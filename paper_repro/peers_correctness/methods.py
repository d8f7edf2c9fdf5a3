"""What a method and a peer are: names, what is promised, and one call."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from paper_repro.peers_correctness.problem import Question, Target


@dataclass(frozen=True)
class Method:
    """One way to a hypergradient.

    Attributes:
        name: the library's own name for it, with the settings that matter.
        target: what its documentation says that it computes.
        call: answers a question with a tensor like x.
        difference: whether it differs finitely, so that an error of a hundredth is its nature.
        uses_rate: whether it converges only if the inner loop's rate does.
        optimizers: the inner optimizers that it can differentiate.
        suits: which questions it is meant for.
    """

    name: str
    target: Target
    call: Callable[[Question], Tensor]
    difference: bool = False
    uses_rate: bool = False
    optimizers: frozenset[str] = frozenset({"sgd", "momentum", "adam"})
    suits: Callable[[Question], bool] = lambda question: True


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        name: on the command line.
        distribution: its name for pip, for its version; None for code of this folder.
        adapter: the module of this folder that has its METHODS; it is imported only when it is asked.
    """

    name: str
    distribution: str | None
    adapter: str

    def version(self) -> str | None:
        """Return the installed version; None if it is not installed, "" for code of this folder."""
        if self.distribution is None:
            return ""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def methods(self) -> Sequence[Method]:
        """Return its methods.

        Raises:
            Exception: whatever its import raises.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old libraries use torch's old names
            found: Sequence[Method] = importlib.import_module(f"paper_repro.peers_correctness.{self.adapter}").METHODS
        return found


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("by-hand", None, "by_hand"),
        Peer("funcmlo", "funcmlo", "with_funcmlo"),
        Peer("betty", "betty-ml", "with_betty"),
        Peer("higher", "higher", "with_higher"),
        Peer("torchopt", "torchopt", "with_torchopt"),
        Peer("boat", "boat-torch", "with_boat"),
    )
}
