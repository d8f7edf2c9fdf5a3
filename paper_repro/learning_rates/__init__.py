"""Learned learning rates: the upper level's parameters are the lower optimizer's hyperparameters."""

from paper_repro.learning_rates.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
