"""Linear solvers for the implicit system Hw = v: frozen configuration, pytree vectors, a matrix-free operator."""

from funcmlo.linear.base import LinearSolver, Solution
from funcmlo.linear.cg import CG
from funcmlo.linear.direct import Direct
from funcmlo.linear.neumann import Neumann

__all__ = ["CG", "Direct", "LinearSolver", "Neumann", "Solution"]
