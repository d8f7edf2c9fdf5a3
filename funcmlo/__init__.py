"""funcmlo: hypergradients through multilevel optimization problems, stateless, on torch.func and torchopt."""

from funcmlo import optim, projections, testing, transforms
from funcmlo._argmin import argmin
from funcmlo._compare import compare
from funcmlo._fixed_point import fixed_point
from funcmlo._probe import probe
from funcmlo._processes import Processes, processes
from funcmlo.batches import Microbatches
from funcmlo.comparing.comparison import Comparison
from funcmlo.curvature import Curvature, Damped, FixedPoint, GaussNewton, Hessian, Resampled
from funcmlo.errors import (
    BatchError,
    CheckpointError,
    DefinitionError,
    EstimatorError,
    FuncmloError,
    FuncmloWarning,
    LossError,
    NonFiniteError,
    OutOfMemoryError,
    ParameterError,
    ProcessError,
)
from funcmlo.graph import Graph
from funcmlo.hypergrad import (
    AID,
    ITD,
    SAMA,
    BestResponse,
    Checkpoint,
    Claims,
    FiniteDifference,
    ForwardGradient,
    OneStep,
    Penalty,
    PerturbedSolve,
    Solved,
    Stats,
)
from funcmlo.level import Level
from funcmlo.linear import (
    CG,
    GMRES,
    KFAC,
    MINRES,
    Direct,
    GradientSteps,
    Identity,
    LinearSolver,
    Neumann,
    NormalEquations,
    Nystrom,
    OptimizerIdentity,
)
from funcmlo.multilevel import Multilevel
from funcmlo.operators import Operator
from funcmlo.probing.outcome import Probe
from funcmlo.replicas import Replicas
from funcmlo.schedule import Schedule
from funcmlo.solver import Solver
from funcmlo.state import State
from funcmlo.stateless import Stateless
from funcmlo.tasks import Shared, per_task
from funcmlo.train import (
    Callback,
    CSVLogger,
    EarlyStopping,
    MLflowLogger,
    TensorBoardLogger,
    WandbLogger,
    load,
    save,
)

__version__ = "0.1.0"

__all__ = [
    "AID",
    "CG",
    "GMRES",
    "ITD",
    "KFAC",
    "MINRES",
    "SAMA",
    "BatchError",
    "BestResponse",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Claims",
    "Comparison",
    "Curvature",
    "Damped",
    "DefinitionError",
    "Direct",
    "EarlyStopping",
    "EstimatorError",
    "FiniteDifference",
    "FixedPoint",
    "ForwardGradient",
    "FuncmloError",
    "FuncmloWarning",
    "GaussNewton",
    "GradientSteps",
    "Graph",
    "Hessian",
    "Identity",
    "Level",
    "LinearSolver",
    "LossError",
    "MLflowLogger",
    "Microbatches",
    "Multilevel",
    "Neumann",
    "NonFiniteError",
    "NormalEquations",
    "Nystrom",
    "OneStep",
    "Operator",
    "OptimizerIdentity",
    "OutOfMemoryError",
    "ParameterError",
    "Penalty",
    "PerturbedSolve",
    "Probe",
    "ProcessError",
    "Processes",
    "Replicas",
    "Resampled",
    "Schedule",
    "Shared",
    "Solved",
    "Solver",
    "State",
    "Stateless",
    "Stats",
    "TensorBoardLogger",
    "WandbLogger",
    "argmin",
    "compare",
    "fixed_point",
    "load",
    "optim",
    "per_task",
    "probe",
    "processes",
    "projections",
    "save",
    "testing",
    "transforms",
]
