"""Whether levels fit together in a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from funcmlo.dependence import Dependence
from funcmlo.describe import compact
from funcmlo.errors import DefinitionError, listing, suggest
from funcmlo.graph import Graph
from funcmlo.level import Level
from funcmlo.signature import BUFFERS, holder


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
