"""Whether levels fit together in a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcmlo.chunks import Measured
from funcmlo.dependence import Dependence
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, listing, suggest
from funcmlo.graph import Graph
from funcmlo.level import Level
from funcmlo.signature import BUFFERS, holder
from funcmlo.tasks import Tasks


def check_levels(levels: Sequence[Level], graph: Graph, users: Mapping[str, Sequence[str]]) -> None:
    """Raise unless a program can be made of the levels.

    Args:
        levels: the levels, lowest first.
        graph: their graph.
        users: for each level, the levels that differentiate through it.

    Raises:
        DefinitionError: a field of a level has no meaning in its place; the message says which and what to do.
    """
    by_name = {level.name: level for level in levels}
    for name in graph.tops:
        level = by_name[name]
        if level.init is not None or level.warmup or level.roll_back or not level.steps:
            raise DefinitionError(
                f"level '{name}' is a top level: no level above it reads it or is read by it, so its steps= says how many "
                "updates it makes for each call of step (at least 1), and init=, warmup= and roll_back= have no meaning; "
                "leave them out (pass its parameters to program.init)."
            )
    for level in levels:
        for source in level.cost_buffers:
            owner = holder(source, level.name)
            if owner not in by_name:
                raise DefinitionError(
                    f"level '{level.name}': its loss reads '{source}', but '{owner}' is no level"
                    f"{suggest(owner, graph.levels)} Levels: {listing(graph.levels)}."
                )
            if source != BUFFERS and owner == level.name:
                raise DefinitionError(
                    f"level '{level.name}': its loss reads '{source}', its own buffers; call that argument 'buffers', and "
                    "return the new ones: (cost, {'buffers': new})."
                )
        if isinstance(level.response, Mapping):
            _check_responses(level.name, level.response, graph, users[level.name])


def task_roles(levels: Sequence[Level], responding: Mapping[str, frozenset[str]]) -> dict[str, Tasks]:
    """Work out what each level has to do with tasks.

    Args:
        levels: the levels, lowest first.
        responding: for each level, those that its hypergradient runs through.

    Returns:
        The levels that have tasks, and those whose cost is evaluated for each task of a level that they read.

    Raises:
        DefinitionError: levels with different numbers of tasks meet, or something has no meaning.
    """
    by_name = {level.name: level for level in levels}
    roles: dict[str, Tasks] = {}
    measured = {level.name: Measured(level.name) for level in levels if level.chunk == "measure"}
    for name in measured:
        if responding[name]:
            raise DefinitionError(
                f"level '{name}': chunk='measure' times a loop that has no other loop inside, but "
                f"{listing(map(repr, responding[name]))} run before each of its updates; give a number."
            )
    for level in levels:
        read = {source: by_name[source] for source in level.reads_levels}
        buffers = {source: by_name[holder(source, level.name)] for source in level.cost_buffers}
        sources = {source: other for source, other in (read | buffers).items() if other.tasks is not None}
        numbers = {other.name: int(other.tasks) for other in (level, *sources.values()) if other.tasks is not None}
        if len(set(numbers.values())) > 1:
            told = listing(f"{n} in '{name}'" for name, n in numbers.items())
            raise DefinitionError(f"level '{level.name}' meets different numbers of tasks ({told}); they must agree.")
        if level.tasks is None:
            outside = [name for name in level.loop_levels if name in sources]
            if outside:
                raise DefinitionError(
                    f"level '{level.name}': its init, optimizer or projection reads {listing(map(repr, outside))}, which "
                    "has tasks, and it has none itself; only its loss can, which is then evaluated for each task."
                )
            if level.reduce is None or not sources:
                continue
            if level.carries_buffers:
                raise DefinitionError(
                    f"level '{level.name}': its loss is evaluated for each task of {listing(map(repr, numbers))}, so it "
                    "cannot move its own buffers on; take reduce=None, with which it sees all tasks at once."
                )
        else:
            alone = [name for name in responding[level.name] if by_name[name].tasks is None]
            if alone:
                raise DefinitionError(
                    f"level '{level.name}' has tasks, but its hypergradient runs through {listing(map(repr, alone))}, which "
                    f"has none: its tasks would not be independent. Give that level tasks={level.tasks} too."
                )
        first = next(iter(sources.values()), level)
        chosen = level if level.tasks is not None or level.chunk is not None else first
        roles[level.name] = Tasks(
            n=next(iter(numbers.values())),
            own=level.tasks is not None,
            sources=frozenset(sources),
            chunk=measured.get(chosen.name, chosen.chunk),  # type: ignore[arg-type]
            randomness=chosen.randomness,
            reduce=level.reduce,
        )
    return roles


def check_nested(levels: Sequence[Level], needs: Dependence) -> None:
    """Raise unless the total derivatives of a program can be composed.

    Args:
        levels: the levels, lowest first.
        needs: what their total costs need.

    Raises:
        DefinitionError: an estimator needs what a nested solution does not keep, or would have to be differentiated again.
    """
    for level in levels:
        if level.roll_back:
            raise DefinitionError(f"level '{level.name}': roll_back=True is carried by composition=\"paths\" only.")
        for upper in needs.users(level.name):
            response = level.response_for(upper)
            below = needs.needed[level.name]
            if below and not response.total:
                raise DefinitionError(
                    f"level '{level.name}': {compact(response)} does not work on a cost with solutions inside (those of "
                    f'{listing(below)}); use AID(CG(…)) or ITD() there, or composition="paths".'
                )
            moving = [name for name in level.loop_levels if name in below]
            looks = response.sees_step or response.uses_optimizer or response.steps_again
            if moving and looks and not response.in_the_open:
                raise DefinitionError(
                    f"level '{level.name}': {compact(response)} looks at the optimizer's step, which reads "
                    f'{listing(moving)} below it; composition="nested" differentiates that through ITD() alone.'
                )
            if response.requires != "solution" and not response.in_the_open:
                raise DefinitionError(
                    f"level '{level.name}': {compact(response)} needs the inner run (requires={response.requires!r}), which "
                    'composition="nested" keeps for plain ITD() alone; use ITD() or AID(…).'
                )
            # T_upper is differentiated twice where a level above it looks at upper's own best response.
            if needs.users(upper) and not response.claims.differentiable:
                raise DefinitionError(
                    f"level '{level.name}': {compact(response)} cannot be differentiated again (its claims say so), but "
                    f"composition=\"nested\" differentiates the best response of '{upper}', whose total cost contains "
                    f"'{level.name}'; use AID(CG(…)) or ITD() there, or composition=\"paths\"."
                )


def _check_responses(name: str, response: Mapping[str, object], graph: Graph, users: Sequence[str]) -> None:
    """Hold a dict of responses against the levels that will ask for one."""
    for upper in response:
        if upper not in graph.levels:
            raise DefinitionError(
                f"level '{name}': its response= names {upper!r}, which is no level{suggest(str(upper), graph.levels)} "
                f"Levels: {listing(graph.levels)}."
            )
        if upper not in users:
            raise DefinitionError(
                f"level '{name}': its response= names '{upper}', but no hypergradient of '{upper}' runs through '{name}'; "
                f"those of {listing(users)} do."
            )
    if missing := [upper for upper in users if upper not in response]:
        raise DefinitionError(
            f"level '{name}': its response= says nothing for {listing(map(repr, missing))}, whose hypergradient runs "
            "through it; add an estimator for each."
        )
