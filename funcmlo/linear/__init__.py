"""Linear solvers for the implicit system Hw = v: frozen configuration, pytree vectors, a matrix-free operator."""

from funcmlo.linear.base import LinearSolver, Prepared, Solution
from funcmlo.linear.cg import CG
from funcmlo.linear.direct import Direct
from funcmlo.linear.neumann import Neumann
from funcmlo.linear.preconditioner import Preconditioner

__all__ = ["CG", "Direct", "LinearSolver", "Neumann", "Preconditioner", "Prepared", "Solution"]
