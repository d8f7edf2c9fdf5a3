"""Data hyper-cleaning: the upper level learns which training labels to believe."""

from paper_repro.hypercleaning.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
