"""Curvature operators for the implicit system: Hessian, Gauss–Newton, fixed points, damped and resampled ones."""

from funcmlo.curvature.base import Curvature
from funcmlo.curvature.damped import Damped
from funcmlo.curvature.fixed_point import FixedPoint
from funcmlo.curvature.gauss_newton import GaussNewton
from funcmlo.curvature.hessian import Hessian
from funcmlo.curvature.resampled import Resampled

__all__ = ["Curvature", "Damped", "FixedPoint", "GaussNewton", "Hessian", "Resampled"]
