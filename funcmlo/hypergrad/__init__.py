"""Best responses: one estimator per file, each a frozen value."""

from funcmlo.hypergrad.aid import AID
from funcmlo.hypergrad.base import BestResponse, Claims
from funcmlo.hypergrad.checkpoint import Checkpoint
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.hypergrad.forward_gradient import ForwardGradient
from funcmlo.hypergrad.itd import ITD
from funcmlo.hypergrad.one_step import OneStep
from funcmlo.hypergrad.penalty import Penalty
from funcmlo.hypergrad.perturbed_solve import PerturbedSolve
from funcmlo.hypergrad.sama import SAMA
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats

__all__ = [
    "AID",
    "ITD",
    "SAMA",
    "BestResponse",
    "Checkpoint",
    "Claims",
    "FiniteDifference",
    "ForwardGradient",
    "OneStep",
    "Penalty",
    "PerturbedSolve",
    "Solved",
    "Stats",
]
