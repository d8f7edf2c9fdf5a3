"""A curvature operator whose every product sees a fresh batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.curvature.base import Body, Cross, Curvature
from funcmlo.curvature.cross import check_loss
from funcmlo.curvature.hessian import Hessian
from funcmlo.errors import DefinitionError
from funcmlo.hypergrad.solved import Solved
from funcmlo.operators import Operator


@dataclass(frozen=True)
class Resampled(Curvature):
    """H by one batch per product: the k-th product and, last, the cross product take the batches after the inner loop's.

    With batches drawn independently each product is unbiased, and so is a series of products of different batches:
    `Neumann` with it is stocBiO, one `GradientSteps` with a warm start is SOBA, several of them AmIGO. Solvers that combine
    their products nonlinearly (`CG`, `MINRES`, `GMRES`) have no such meaning; they run, and their residuals are noise.

    Batches come from an indexed source or an iterator; with a fixed batch every product is the same, up to what the
    loss itself draws (dropout).

    Args:
        curvature: H.

    Raises:
        DefinitionError: there is no such curvature.

    Example:
        >>> import funcmlo as fm
        >>> stocbio = fm.AID(fm.Neumann(10, scale=0.1), curvature=Resampled())
        >>> stocbio.claims.stochastic
        True

    References:
        Ji, Yang and Liang 2021 (stocBiO), arXiv 2010.07962; Dagréou et al. 2022 (SOBA), arXiv 2201.13409; Arbel and
        Mairal 2022 (AmIGO), arXiv 2111.14580.
    """

    curvature: Curvature = Hessian()

    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no curvature, and take over what it says of itself."""
        if not isinstance(self.curvature, Curvature) or self.curvature.sees_step:
            raise DefinitionError(
                f"Resampled(curvature={self.curvature!r}): expected a curvature of the loss, such as Hessian() or "
                "GaussNewton(outputs, loss)."
            )
        for name in ("assumes", "exact", "symmetric", "second_order", "total"):
            object.__setattr__(self, name, getattr(self.curvature, name))

    def within(self, solved: Solved, cotangent: Tree, body: Body, *, transpose: bool = False) -> Tree:
        """Do something with Hw = v; see the base class."""
        del transpose
        check_loss("Resampled", solved)
        draws = itertools.count()

        def drawn() -> Solved:
            i = next(draws)
            evaluate = solved.evaluate
            return replace(
                solved,
                loss=lambda y, x, draw=None: solved.loss(y, x, draw=i),
                evaluate=evaluate and (lambda call, first, x, draw=None, **how: evaluate(call, first, x, i, **how)),
            )

        def matvec(u: Tree) -> Tree:
            return self.curvature.within(drawn(), u, lambda operator, rhs, cross: operator(rhs))

        def cross(w: Tree) -> dict[str, Tree]:
            def crossed(operator: Operator, rhs: Tree, cross: Cross) -> Tree:
                return cross(rhs)

            return dict(self.curvature.within(drawn(), w, crossed))

        return body(Operator(matvec, like=_tree.detach(solved.params)), cotangent, cross)
