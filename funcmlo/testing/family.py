"""One good instance of every problem with a known hypergradient."""

from __future__ import annotations

import torch

from funcmlo.testing.classics import Mirrlees, MitsosBarton
from funcmlo.testing.equilibrium import Equilibrium
from funcmlo.testing.known import Known
from funcmlo.testing.literature import SMD
from funcmlo.testing.network import Network
from funcmlo.testing.quadratic import Quadratic
from funcmlo.testing.regression import LogisticRegression, Ridge
from funcmlo.testing.saddle import Saddle
from funcmlo.testing.singular import SingularHessian


def problems() -> tuple[Known, ...]:
    """Return one instance of every problem with a known hypergradient.

    Returns:
        The problems, the simplest first. Which assumptions hold, each says in `assumptions`.

    Example:
        >>> [problem.name for problem in problems() if "positive definite" not in problem.assumptions]
        ['SingularHessian', 'Saddle', 'Equilibrium']
    """
    tree = {"w": torch.zeros(2, 2, dtype=torch.float64), "b": [torch.zeros((), dtype=torch.float64)]}
    return (
        Quadratic(),
        Quadratic(condition=10.0, y_like=tree, x_like=(torch.zeros(2, dtype=torch.float64),)),
        Ridge(),
        Ridge(shared=True),
        LogisticRegression(),
        LogisticRegression(learned="regularizers"),
        Network(seed=8),
        SingularHessian(),
        Saddle(),
        Equilibrium(),
        *(SMD(number) for number in (1, 2, 3, 4, 5, 7, 8)),
        MitsosBarton(),
        Mirrlees(),
    )
