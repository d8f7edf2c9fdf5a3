"""Proving a hypergradient right: oracles, problems whose answer is known, and the checks of an estimator.

`fm.testing.strategies` has hypothesis strategies; it is imported when it is first asked for, because it needs hypothesis.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from funcmlo.testing.brute_force import unrolled
from funcmlo.testing.by_hand import solved
from funcmlo.testing.check import check_estimator, parametrize_with_checks
from funcmlo.testing.classics import Mirrlees, MitsosBarton
from funcmlo.testing.complexified import complex_step
from funcmlo.testing.dense import dense_implicit
from funcmlo.testing.differences import Estimate, finite_difference
from funcmlo.testing.equilibrium import Equilibrium
from funcmlo.testing.family import problems
from funcmlo.testing.hierarchy import Hierarchy
from funcmlo.testing.known import Bilevel, Known
from funcmlo.testing.literature import SMD
from funcmlo.testing.network import Network
from funcmlo.testing.outcome import Report
from funcmlo.testing.quadratic import Quadratic
from funcmlo.testing.regression import LogisticRegression, Ridge
from funcmlo.testing.saddle import Saddle
from funcmlo.testing.singular import SingularHessian
from funcmlo.testing.taylor import TaylorTest, taylor_test
from funcmlo.testing.written import code, transformation

__all__ = [
    "SMD",
    "Bilevel",
    "Equilibrium",
    "Estimate",
    "Hierarchy",
    "Known",
    "LogisticRegression",
    "Mirrlees",
    "MitsosBarton",
    "Network",
    "Quadratic",
    "Report",
    "Ridge",
    "Saddle",
    "SingularHessian",
    "TaylorTest",
    "check_estimator",
    "code",
    "complex_step",
    "dense_implicit",
    "finite_difference",
    "parametrize_with_checks",
    "problems",
    "solved",
    "taylor_test",
    "transformation",
    "unrolled",
]


def __getattr__(name: str) -> ModuleType:
    if name == "strategies":
        return importlib.import_module("funcmlo.testing.strategies")
    raise AttributeError(f"module 'funcmlo.testing' has no attribute {name!r}")
