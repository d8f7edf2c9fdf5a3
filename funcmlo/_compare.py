"""`compare`: estimators side by side on a user's own problem."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch

from funcmlo import _random, _tree
from funcmlo._tree import Tree
from funcmlo.comparing import measuring
from funcmlo.comparing import reference as references
from funcmlo.comparing.comparison import Comparison
from funcmlo.comparing.substitution import Nothing, Place
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, ParameterError, listing, suggest
from funcmlo.hypergrad.base import BestResponse
from funcmlo.multilevel import Multilevel
from funcmlo.purity import untouched
from funcmlo.state import State


def compare(
    estimators: Sequence[BestResponse] | Mapping[str, BestResponse],
    program: Multilevel,
    state: State,
    batches: Mapping[str, Any],
    *,
    of: str | None = None,
    through: str | Sequence[str] | None = None,
    repeats: int = 3,
    samples: int = 16,
    reference: str | BestResponse | Tree | None = None,
) -> Comparison:
    """Compare estimators on a program: how far off each is, and what it costs.

    Each is put in as the response, for level `of`, of the levels `through`, and the hypergradient is taken at `state`, from
    the same start with the same batches and draws: all see the same inner solution. What other levels see of them
    stays. Estimators begin from their first state, so a warm start is not seen here.

    The reference r is, by default, the implicit hypergradient −∇²_xy g H⁻¹v at that very solution, in float64 where the
    losses bear it: with a dense H for at most 1000 parameters, else by MINRES. Its own error is measured too. Where
    there is none (no second derivative), it is the derivative of the inner run.

    Args:
        estimators: a list, or a dict from names to estimators.
        program: the program, whose own estimators take no part.
        state: where it stands; not changed.
        batches: by level name, a fixed batch or a function from the level's step number to a batch; not changed.
        of: the level whose hypergradient is taken; None for the only top level.
        through: the lower levels whose response is replaced; None for all that level `of` differentiates through.
        repeats: how often each is timed, all of them interleaved.
        samples: draws of each stochastic estimator, with the inner loop held fixed.
        reference: `"implicit"`; `"unrolled"`, the derivative of the run that was made, by `ITD()`; an estimator; or a
            gradient that you know.

    Returns:
        The comparison. An estimator that raises has a row with the reason.

    Raises:
        DefinitionError: the arguments do not fit the program.
        EstimatorError: there is no reference.
        ParameterError: the state is another program's, or the reference unlike the level's parameters.
        FuncmloError: the program itself does not run, whatever the estimator.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> problem = fm.testing.Quadratic(condition=10.0)
        >>> program = problem.program(fm.FiniteDifference())
        >>> found = compare([fm.AID(fm.CG(1)), fm.AID(fm.CG(3))], program, problem.state(program), {})
        >>> found["AID(CG(3))"].error < 1e-9 < found["AID(CG(1))"].error
        True
        >>> found.best(1e-6) == fm.AID(fm.CG(3))
        True
    """
    named = _named(estimators)
    place = _place(program, of, through)
    for name, number, least in (("repeats", repeats, 1), ("samples", samples, 2)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise DefinitionError(f"{name}={number!r}; expected an integer of at least {least}.")
    if not isinstance(state, State) or set(state.params) != set(program.graph.levels):
        came = listing(state.params) if isinstance(state, State) else type(state).__name__
        raise ParameterError(f"expected the State that program.init returns; that of {came} came.")
    return _compared(named, place, state, batches, repeats, samples, reference)


def _compared(
    named: Mapping[str, BestResponse],
    place: Place,
    state: State,
    batches: Mapping[str, Any],
    repeats: int,
    samples: int,
    wanted: Any,
) -> Comparison:
    fixed = batches if isinstance(batches, Mapping) else {}
    fixed = {name: batch for name, batch in fixed.items() if not (callable(batch) or isinstance(batch, Iterator))}
    watched = {"the state was": state, "the batches were": fixed}
    # An estimator of the user's own may draw from the default generator, which is put back.
    with _random.seeded(_random.step_seed(state.seed, "compare", 0)), untouched(watched, "They are changed now."):
        with warnings.catch_warnings(record=True) as usual:
            warnings.simplefilter("always")
            place.put(Nothing(), warn=True)  # what the program is warned of with any estimator is no note on one of them
        warned = {str(warning.message).splitlines()[0] for warning in usual}
        common = measuring.shared(place, state, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = references.find(place, state, batches, wanted)
        rows = [measuring.tried(place, name, estimator, state, batches) for name, estimator in named.items()]
        rows = [replace(row, notes=tuple(note for note in row.notes if note not in warned)) for row in rows]
        rows, seconds = measuring.timed(place, rows, state, batches, repeats)
        rows = [measuring.against(row, found.gradient) for row in rows]
        rows = [measuring.sampled(place, row, state, batches, found.gradient, samples) for row in rows]
    return Comparison(
        rows=tuple(rows),
        reference=found,
        of=place.of,
        through=place.through,
        inner=common.inner,
        shared_seconds=seconds,
        shared_memory=common.memory,
        repeats=repeats,
        device=_device(state),
    )


def _named(estimators: Any) -> dict[str, BestResponse]:
    """The estimators by name."""
    if isinstance(estimators, Mapping):
        named = dict(estimators)
    elif isinstance(estimators, Sequence) and not isinstance(estimators, str):
        named = {}
        for estimator in estimators:
            name = compact(estimator)
            if name in named:
                raise DefinitionError(f"two estimators are {name}; name them by a dict, {{'mine': …}}.")
            named[name] = estimator
    else:
        raise DefinitionError(
            f"estimators came as {type(estimators).__name__}; expected a list such as [fm.ITD(), fm.AID(fm.CG(20))], or a "
            "dict from names to estimators."
        )
    if not named:
        raise DefinitionError("there are no estimators to compare; pass some, such as [fm.ITD(), fm.AID(fm.CG(20))].")
    for name, estimator in named.items():
        if not isinstance(estimator, BestResponse):
            raise DefinitionError(
                f"estimator {name!r} is {type(estimator).__name__}; expected a best response such as fm.AID(fm.CG(20))."
            )
    return {str(name): estimator for name, estimator in named.items()}


def _place(program: Any, of: str | None, through: str | Sequence[str] | None) -> Place:
    """Where the estimators are put."""
    if not isinstance(program, Multilevel):
        raise DefinitionError(f"program came as {type(program).__name__}; expected fm.Multilevel(…).")
    graph = program.graph
    if of is None:
        if len(graph.tops) > 1:
            raise DefinitionError(f"the program has several top levels, {listing(graph.tops)}; say of='{graph.tops[-1]}'.")
        of = graph.tops[0]
    graph.check(of)
    possible = tuple(name for name in graph.levels if of in program._plan.users[name])
    if not possible:
        raise DefinitionError(
            f"level '{of}' differentiates through no lower level, so no estimator enters its hypergradient. Its graph:\n"
            f"{graph}"
        )
    wanted = possible if through is None else (through,) if isinstance(through, str) else tuple(through)
    for name in wanted:
        if name not in possible:
            raise DefinitionError(
                f"through= names {name!r}, but level '{of}' does not differentiate through it"
                f"{suggest(str(name), possible)} It does through {listing(possible)}."
            )
    if not wanted:
        raise DefinitionError(f"through= is empty; level '{of}' differentiates through {listing(possible)}.")
    levels = {level.name: level for level in program.levels}
    if tasks := [name for name in wanted if levels[name].tasks is not None]:
        raise DefinitionError(
            f"compare looks at one inner problem at a time, but {listing(map(repr, tasks))} stands for that of every task; "
            "compare on the program of one task, without tasks=."
        )
    return Place(program, of, tuple(name for name in graph.levels if name in wanted))


def _device(state: State) -> str:
    kinds = sorted({x.device.type for x in _tree.leaves(state.params)})
    if "cuda" in kinds:
        return f"{torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{listing(kinds)} ({threads} thread{'' if threads == 1 else 's'})"
