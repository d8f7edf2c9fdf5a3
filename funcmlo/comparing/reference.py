"""What estimators are compared with: the best hypergradient that can be afforded, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.comparing.substitution import Place
from funcmlo.describe import compact
from funcmlo.errors import EstimatorError, ParameterError
from funcmlo.hypergrad import AID, ITD
from funcmlo.hypergrad.base import BestResponse
from funcmlo.linear import CG, GMRES, MINRES, Direct, Identity
from funcmlo.state import State

Wanted = Literal["implicit", "unrolled"] | BestResponse | Tree

_DENSE = 1000  # so many parameters are laid out as a matrix
_ITERATIONS = 2000


@dataclass(frozen=True)
class Reference:
    """The hypergradient that estimators are compared with.

    Attributes:
        gradient: a tree like the level's parameters.
        description: what it is.
        error: its own relative error, estimated: the greater of the linear system's residual and of the difference between
            two solvers; for the unrolled derivative, between two ways of taking it. None where it is not known.
        moves: by how much it changes, relatively, if the inner loops go on for as many steps again: what is left unsolved.
            None where it is not known.
        remarks: sentences about how it was found.
    """

    gradient: Tree
    description: str
    error: float | None
    moves: float | None
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Point:
    """Where a reference is taken, in some precision."""

    place: Place
    state: State
    batches: Mapping[str, Any]
    wide: bool

    def reached(self, longer: int = 1) -> State:
        """The solution that the state's own precision reaches."""
        state = self.place.reached(self.state, self.batches, longer)
        return widened(state) if self.wide else state

    @property
    def feeds(self) -> Mapping[str, Any]:
        return widened_batches(self.batches) if self.wide else self.batches

    def solved(self, estimator: BestResponse, at: State) -> tuple[Tree, float, bool]:
        """The hypergradient at a solution, its linear residual, and whether all systems are known to be solved."""
        answer = self.place.run(estimator, at, self.feeds, solve=False)
        _check_finite(answer.gradient)
        found = answer.stats.values()
        good = all(stats.converged is not False and not stats.negative_curvature for stats in found)
        return answer.gradient, max((stats.residual or 0.0 for stats in found), default=0.0), good

    def run(self, estimator: BestResponse, longer: int = 1) -> Tree:
        """The hypergradient with the run that leads there."""
        state = widened(self.state) if self.wide else self.state
        gradient = self.place.run(estimator, state, self.feeds, longer=longer).gradient
        _check_finite(gradient)
        return gradient


def find(place: Place, state: State, batches: Mapping[str, Any], wanted: Any) -> Reference:
    """Find the reference.

    Args:
        place: the program, and where estimators are put.
        state: where it stands.
        batches: its batches.
        wanted: `"implicit"`, `"unrolled"`, an estimator, a gradient; None for the first of the first two that there is.

    Returns:
        It, in float64 where the losses bear that.

    Raises:
        EstimatorError: it cannot be found; the message says why and what to give instead.
        ParameterError: a gradient came that is not like the level's parameters.
    """
    own = state.params[place.of]
    if wanted is not None and not isinstance(wanted, (str, BestResponse)):
        if _tree.structure(own) != _tree.structure(wanted) or _tree.mismatch(widened(own), widened(wanted)):
            raise ParameterError(
                f"reference= came as {type(wanted).__name__}; expected None, 'implicit', 'unrolled', an estimator, or a "
                f"gradient like the parameters of level '{place.of}', {_tree.describe(own)}."
            )
        return Reference(_tree.detach(wanted), "the gradient that was given", None, None)
    if isinstance(wanted, str) and wanted not in _KINDS:
        raise EstimatorError(f"reference={wanted!r}; expected 'implicit', 'unrolled', an estimator or a gradient.")
    ways: list[Any] = list(_KINDS) if wanted is None else [wanted]
    failed: list[str] = []
    for way in ways:
        take = _KINDS[way] if isinstance(way, str) else _given(way)
        points = [_Point(place, state, batches, wide=False)]
        remarks: list[str] = []
        if any(x.dtype != torch.float64 for x in _tree.leaves(state.params)):
            points.insert(0, replace(points[0], wide=True))
        for point in points:
            try:
                if point.wide:
                    _check_wide(point)
                found = take(point)
            except Exception as error:  # whatever a loss raises in another precision
                why = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
                if point.wide:
                    dtype = _tree.precision(state.params)
                    remarks.append(f"The reference is in the program's own {dtype}, because in float64: {why}")
                else:
                    failed.append(f"{way if isinstance(way, str) else compact(way)}: {why}")
                continue
            told = (f"There is no {failed[0]}",) if failed else ()
            return replace(found, remarks=(*told, *remarks, *found.remarks))
    raise EstimatorError(
        f"no reference was found ({'; '.join(failed)}); give reference= an estimator that works here, or a gradient that "
        "you know."
    )


def _implicit(point: _Point) -> Reference:
    """−∇²_xy g H⁻¹v at the solution that was reached, by two solvers."""
    at = point.reached()
    levels = {level.name: level for level in point.place.program.levels}
    size = max(_tree.size(at.params[name]) for name in point.place.through)
    projected = any(levels[name].project is not None for name in point.place.through)
    tol = 100 * max(_tree.coarsest_epsilon(at.params[name]) for name in point.place.through)
    most = min(4 * size + 4, _ITERATIONS)
    dense = size <= _DENSE // (3 if projected else 1)  # an optimizer's state may be in the system of a projected step
    if projected:
        first = AID(Direct() if dense else GMRES(most, tol=tol), curvature="fixed_point")
        second = AID(GMRES(most, tol=tol, restart=None if dense else 20), curvature="fixed_point")
    else:
        first = AID(Direct()) if dense else AID(MINRES(most, tol=tol))
        second = AID(MINRES(most, tol=tol)) if dense else AID(CG(most, tol=tol))
    gradient, residual, _ = point.solved(first, at)
    again, _, good = point.solved(second, at)
    if not good and not dense and not projected:  # CG stops at negative curvature: half of the effort, a pessimistic bound
        half = AID(MINRES(max(1, most // 2), tol=tol))
        again, _, _ = point.solved(half, at)
    error = max(residual, relative(again, gradient))
    moves, told = _moves(point, gradient, lambda: point.solved(first, point.reached(2))[0])
    what = f"the implicit hypergradient at the solution that was reached, {compact(first)}"
    return Reference(gradient, f"{what} in {_dtype(gradient)}", error, moves, told)


def _unrolled(point: _Point) -> Reference:
    """The derivative of the run that was made, taken in two ways."""
    gradient = point.run(ITD())
    try:
        error = relative(point.run(ITD(memory="mixed")), gradient)
    except Exception:  # not every loss has a forward mode
        error = None
    moves, told = _moves(point, gradient, lambda: point.run(ITD(), 2))
    return Reference(gradient, f"the derivative of the inner run, ITD() in {_dtype(gradient)}", error, moves, told)


def _given(estimator: BestResponse) -> Callable[[_Point], Reference]:
    def take(point: _Point) -> Reference:
        gradient = point.run(estimator)
        moves, told = _moves(point, gradient, lambda: point.run(estimator, 2))
        return Reference(gradient, f"{compact(estimator)} in {_dtype(gradient)}", None, moves, told)

    return take


_KINDS: dict[str, Callable[[_Point], Reference]] = {"implicit": _implicit, "unrolled": _unrolled}


def _moves(point: _Point, gradient: Tree, farther: Callable[[], Tree]) -> tuple[float | None, tuple[str, ...]]:
    """How much a reference changes with longer inner loops, or why that is not known."""
    levels = {level.name: level for level in point.place.program.levels}
    if not any(levels[name].steps for name in point.place.through):
        return None, ()
    try:
        return relative(farther(), gradient), ()
    except Exception as error:  # no batches for more steps, say
        why = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return None, (f"How far the inner problem is from solved could not be told: longer inner loops failed ({why}).",)


def _check_wide(point: _Point) -> None:
    """Raise unless the losses are the same functions in float64, which those that draw at random are not."""
    narrow = replace(point, wide=False)
    # One product with the mixed derivative looks at both losses.
    a, b = (p.place.run(AID(Identity()), p.reached(), p.feeds, solve=False).gradient for p in (narrow, point))
    tolerance = max(torch.finfo(x.dtype).eps for x in _tree.leaves(point.state.params)) ** 0.5
    if not (apart := relative(a, b)) <= 10 * tolerance:
        raise EstimatorError(f"the losses are other functions there ({apart:.1e} apart; do they draw at random?)")


def relative(a: Tree, reference: Tree) -> float:
    """Return ‖a − r‖ / ‖r‖ over all leaves, in float64; for r = 0, zero or infinity.

    Example:
        >>> import torch
        >>> relative(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.2
    """
    a, r = flat(a), flat(reference)
    norm, difference = float(r.norm()), float((a - r).norm())
    return difference / norm if norm else (0.0 if difference == 0 else float("inf"))


def flat(tree: Tree) -> Tensor:
    """Return a tree's numbers in a row, in float64 on the CPU."""
    rows = [x.detach().reshape(-1).to("cpu", torch.float64) for x in _tree.leaves(tree)]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)


def _check_finite(gradient: Tree) -> None:
    if not bool(_tree.finite(gradient)):
        raise EstimatorError("it is not finite")


def _dtype(gradient: Tree) -> str:
    return str(_tree.precision(gradient)).removeprefix("torch.")


def widened(tree: Tree) -> Tree:
    """Return a tree with its floating-point tensors in float64; everything else stays."""
    return _tree.map_tensors(lambda x: x.double() if x.is_floating_point() else x, tree)


def widened_batches(batches: Mapping[str, Any]) -> dict[str, Any]:
    """Return batches, fixed or functions, in float64.

    Args:
        batches: by level name.

    Returns:
        The same with their floating-point tensors in float64.
    """

    def wide(given: Any) -> Any:
        return (lambda t: widened(given(t))) if callable(given) else widened(given)

    return {name: wide(given) for name, given in batches.items()}
