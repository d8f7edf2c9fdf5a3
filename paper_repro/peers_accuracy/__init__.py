"""Time to accuracy: what each library needs for hypergradients within a tolerance, all along a hyper-cleaning run."""

from paper_repro.peers_accuracy.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
