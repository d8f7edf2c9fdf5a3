"""funcmlo: hypergradients through multilevel optimization problems, stateless, on torch.func and torchopt."""

from funcmlo._argmin import argmin
from funcmlo._fixed_point import fixed_point
from funcmlo.errors import (
    BatchError,
    DefinitionError,
    EstimatorError,
    FuncmloError,
    FuncmloWarning,
    LossError,
    NonFiniteError,
    ParameterError,
)
from funcmlo.graph import Graph
from funcmlo.hypergrad import AID, ITD, BestResponse, Claims, FiniteDifference, Solved, Stats
from funcmlo.level import Level
from funcmlo.linear import CG, Direct, LinearSolver, Neumann
from funcmlo.multilevel import Multilevel
from funcmlo.operators import Operator
from funcmlo.schedule import Schedule
from funcmlo.solver import Solver
from funcmlo.state import State
from funcmlo.stateless import Stateless

__version__ = "0.1.0"

__all__ = [
    "AID",
    "CG",
    "ITD",
    "BatchError",
    "BestResponse",
    "Claims",
    "DefinitionError",
    "Direct",
    "EstimatorError",
    "FiniteDifference",
    "FuncmloError",
    "FuncmloWarning",
    "Graph",
    "Level",
    "LinearSolver",
    "LossError",
    "Multilevel",
    "Neumann",
    "NonFiniteError",
    "Operator",
    "ParameterError",
    "Schedule",
    "Solved",
    "Solver",
    "State",
    "Stateless",
    "Stats",
    "argmin",
    "fixed_point",
]
