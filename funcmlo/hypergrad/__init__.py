"""Best responses: one estimator per file, each a frozen value."""

from funcmlo.hypergrad.aid import AID
from funcmlo.hypergrad.base import BestResponse, Claims, Solved, Stats
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.hypergrad.itd import ITD

__all__ = ["AID", "ITD", "BestResponse", "Claims", "FiniteDifference", "Solved", "Stats"]
