"""Best responses: one estimator per file, each a frozen value."""

from funcmlo.hypergrad.aid import AID
from funcmlo.hypergrad.base import BestResponse, Claims
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.hypergrad.itd import ITD
from funcmlo.hypergrad.solved import Solved
from funcmlo.hypergrad.stats import Stats

__all__ = ["AID", "ITD", "BestResponse", "Claims", "FiniteDifference", "Solved", "Stats"]
