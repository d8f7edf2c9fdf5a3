"""The peak memory of a hypergradient, from one or two runs of few inner steps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from funcmlo import _random, _tree
from funcmlo.comparing.peak_memory import peak_memory
from funcmlo.comparing.substitution import Place
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError
from funcmlo.footprint.law import Law, law
from funcmlo.footprint.report import Footprint, MemoryReport
from funcmlo.hypergrad.aid import AID
from funcmlo.hypergrad.base import BestResponse
from funcmlo.hypergrad.checkpoint import Checkpoint
from funcmlo.hypergrad.finite_difference import FiniteDifference
from funcmlo.hypergrad.itd import ITD
from funcmlo.linear.cg import CG
from funcmlo.state import State

FEW, MORE = 3, 5
"""The inner steps of the two runs: in a first step there may be no tangent yet, and a second has none before it."""

_COLUMNS = 64  # of forward mode's memory, one for each scalar of the inputs: with more it is not tried unasked


def predict(
    program: Any, state: State, batches: Mapping[str, Any], *, of: str, responses: Sequence[BestResponse] | None = None
) -> MemoryReport:
    """Predict the peak memory of a level's hypergradient with each of some responses; nothing is changed.

    Each is put in for the levels that are differentiated through, the hypergradient is taken through three and, where its
    memory grows, through five of their inner steps, and its law of growth tells the peak for the level's own number.

    Args:
        program: the program.
        state: where it stands.
        batches: as for `hypergradient`; those of further inner steps are taken to be of the same size.
        of: the level's name.
        responses: the responses; None for the modes of `ITD`, `AID(CG(10))` and `FiniteDifference()`. Forward mode, whose
            memory is in proportion to the inputs, is among them for at most 64 scalars.

    Returns:
        A table that prints itself; a response that does not run has a row with the reason.

    Raises:
        DefinitionError: there is no such level, it is differentiated through none, or a response is none.

    Example:
        >>> import torch, torchopt, funcmlo as fm
        >>> program = fm.Multilevel(
        ...     fm.Level("y", lambda y, x: ((y - x) ** 2).sum(), torchopt.sgd(0.1), steps=1000, response=fm.ITD()),
        ...     fm.Level("x", lambda x, y: (y**2).sum(), torchopt.sgd(0.1)),
        ... )
        >>> state = program.init({"y": torch.zeros(1000), "x": torch.zeros(())})
        >>> report = program.memory(state, {}, of="x", responses=[fm.ITD(memory="recompute"), fm.AID(fm.CG(10))])
        >>> [round(row.peak / report.parameters) for row in report]
        [1008, 9]
    """
    program.graph.check(of)
    through = tuple(level.name for level in program.levels if of in program._plan.users[level.name])
    if not through:
        raise DefinitionError(f"level '{of}' is not differentiated through any level; name one that is above others.")
    place = Place(program, of, through)
    rows = []
    with _random.seeded(_random.step_seed(state.seed, "memory", 0)):
        for response in _standard(program, state, through) if responses is None else responses:
            if not isinstance(response, BestResponse):
                raise DefinitionError(f"responses={responses!r}: expected best responses such as ITD() and AID(CG(10)).")
            rows.append(_row(place, response, state, batches))
    steps = {level.name: level.steps for level in program.levels if level.name in through}
    size = sum(x.numel() * x.element_size() for name in through for x in _tree.leaves(state.params[name]))
    return MemoryReport(tuple(rows), of, steps, size)


def _standard(program: Any, state: State, through: tuple[str, ...]) -> list[BestResponse]:
    modes: list[BestResponse] = [
        ITD(),
        ITD(memory="recompute"),
        ITD(memory="mixed"),
        ITD(memory=Checkpoint()),
        ITD(memory=Checkpoint(arity=2)),
    ]
    inputs = {source for source, reader in (*program.graph.u2l, *program.graph.l2u) if reader in through}
    if sum(_tree.size(state.params[name]) for name in inputs) <= _COLUMNS:
        modes.append(ITD(mode="forward"))
    return [*modes, AID(CG(10)), FiniteDifference()]


def _row(place: Place, response: BestResponse, state: State, batches: Mapping[str, Any]) -> Footprint:
    grows = law(response)
    own = tuple(level.steps for level in place.program.levels if level.name in place.through)
    measured: dict[tuple[int, ...], int] = {}

    def measure(steps: tuple[int, ...]) -> int:
        if steps not in measured:
            levels = dict(zip(place.through, steps, strict=True))
            short = type(place.program)(
                *(replace(x, steps=levels.get(x.name, x.steps), replay=False) for x in place.program.levels),
                composition=place.program.composition,
            )
            at = replace(place, program=short)
            measured[steps] = peak_memory(lambda: at.run(response, state, batches))[1]
        return measured[steps]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peak = _extrapolated(grows, own, measure)
    except Exception as error:  # a row with the reason: the others are told all the same
        why = str(error).splitlines() or [""]
        return Footprint(compact(response), response, None, grows.words, {}, f"{type(error).__name__}: {why[0]}")
    return Footprint(compact(response), response, peak, grows.words, measured)


def _extrapolated(grows: Law, own: tuple[int, ...], measure: Any) -> int:
    """What is measured at few steps, and of each level what its further steps add."""
    few = tuple(min(n, FEW) for n in own)
    peak = float(measure(few))
    for i, n in enumerate(own):
        more = min(n, MORE)
        if grows.count(n) == grows.count(few[i]):
            continue
        added = measure((*few[:i], more, *few[i + 1 :])) - measure(few)
        peak += added * (grows.count(n) - grows.count(few[i])) / max(grows.count(more) - grows.count(few[i]), 1)
    return round(peak)
