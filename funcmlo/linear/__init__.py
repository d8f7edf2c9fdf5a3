"""Linear solvers for the implicit system Hw = v: frozen configuration, pytree vectors, a matrix-free operator."""

from funcmlo.linear.base import LinearSolver, Prepared, Solution
from funcmlo.linear.cg import CG
from funcmlo.linear.direct import Direct
from funcmlo.linear.gmres import GMRES
from funcmlo.linear.gradient_steps import GradientSteps
from funcmlo.linear.identity import Identity
from funcmlo.linear.kfac import KFAC
from funcmlo.linear.minres import MINRES
from funcmlo.linear.neumann import Neumann
from funcmlo.linear.normal_equations import NormalEquations
from funcmlo.linear.nystrom import Nystrom
from funcmlo.linear.optimizer_identity import OptimizerIdentity
from funcmlo.linear.preconditioner import Preconditioner

__all__ = [
    "CG",
    "GMRES",
    "KFAC",
    "MINRES",
    "Direct",
    "GradientSteps",
    "Identity",
    "LinearSolver",
    "Neumann",
    "NormalEquations",
    "Nystrom",
    "OptimizerIdentity",
    "Preconditioner",
    "Prepared",
    "Solution",
]
