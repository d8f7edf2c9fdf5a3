"""Proving a hypergradient right: oracles, problems whose answer is known, and the checks of an estimator."""

from funcmlo.testing.by_hand import solved
from funcmlo.testing.check import check_estimator, parametrize_with_checks
from funcmlo.testing.known import Bilevel, Known
from funcmlo.testing.outcome import Report
from funcmlo.testing.quadratic import Quadratic

__all__ = ["Bilevel", "Known", "Quadratic", "Report", "check_estimator", "parametrize_with_checks", "solved"]
