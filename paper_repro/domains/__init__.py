"""Pretrain, finetune, reweight: the third level learns which styles of source data to learn from."""

from paper_repro.domains.run import EXPERIMENT

__all__ = ["EXPERIMENT"]
