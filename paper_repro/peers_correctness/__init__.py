"""The correctness of peer libraries: their hypergradients and this library's on problems whose answers are known."""

from paper_repro.peers_correctness.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
