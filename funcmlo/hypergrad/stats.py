"""What best-response products cost, and how good they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from funcmlo import _tree


@dataclass(frozen=True)
class Stats:
    """What best-response products cost, and how far their linear system was solved.

    Fields are read as attributes or by name, `stats["hvps"]`, as from the plain dict that an estimator may return instead.

    Attributes:
        hvps: Hessian-vector products.
        gradients: gradients of the lower cost.
        steps: inner steps that were differentiated.
        replayed: inner steps that were made again without being differentiated, by estimators that save memory or sample.
        iterations: iterations of the linear solver.
        residual: ‖v − Hw‖ / ‖v‖ of the linear system as the solver knows it; None without a system.
        converged: whether the solver met its tolerance; None without a system.
        negative_curvature: whether the solver met a direction of zero or negative curvature and stopped there.
        products: how many products Jᵀv these numbers are the sum of.
    """

    hvps: int = 0
    gradients: int = 0
    steps: int = 0
    replayed: int = 0
    iterations: int | Tensor | None = None
    residual: float | Tensor | None = None
    converged: bool | Tensor | None = None
    negative_curvature: bool | Tensor | None = None
    products: int = 1

    def __getitem__(self, name: str) -> Any:
        """Return a field by its name.

        Args:
            name: the field's name.

        Returns:
            Its value.

        Raises:
            KeyError: there is no such field.
        """
        names = [f.name for f in fields(self)]
        if name not in names:
            raise KeyError(f"{name!r} is no statistic; there are {', '.join(names)}")
        return getattr(self, name)

    def __add__(self, other: Stats) -> Stats:
        """Return the stats of both together: counts added, the larger residual, converged only if both are."""

        def both(name: str, join: Callable[[Any, Any], Any]) -> Any:
            a, b = getattr(self, name), getattr(other, name)
            return b if a is None else a if b is None else join(a, b)

        counts = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return Stats(
            **counts,
            iterations=both("iterations", lambda a, b: a + b),
            residual=both("residual", max),
            converged=both("converged", lambda a, b: a and b),
            negative_curvature=both("negative_curvature", lambda a, b: a or b),
        )

    def plain(self) -> Stats:
        """Return the same stats with Python numbers in place of 0-d tensors (waits for the device); tasks keep theirs."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        numbers: dict[str, Any] = {n: x.item() if not x.dim() else x for n, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **numbers)


_tree.register(
    Stats,
    children=("iterations", "residual", "converged", "negative_curvature"),
    constants=("hvps", "gradients", "steps", "replayed", "products"),
)

_COUNTS = ("hvps", "gradients", "steps", "replayed", "products")
