"""What a program declares that is legal and yet probably not meant."""

from __future__ import annotations

from collections.abc import Sequence

from funcmlo.describe import compact
from funcmlo.errors import listing
from funcmlo.graph import Graph
from funcmlo.level import Level


def doubts(levels: Sequence[Level], graph: Graph) -> list[str]:
    """Say what a program declares that is legal and yet probably not meant.

    Args:
        levels: the levels, lowest first.
        graph: their graph.

    Returns:
        A sentence for each doubt.
    """
    pathless = [name for name in graph.tops if graph.below(name) and not graph.responding(name)]
    found = [
        f"no path leads from level '{name}' through a level below it back to its cost, so its hypergradient is its direct "
        f"gradient alone. Its graph:\n{graph}"
        for name in pathless
    ]
    read = {source for source, _ in (*graph.u2l, *graph.l2u)}
    told = {lower for name in pathless for lower in graph.below(name)}
    found += [
        f"level '{name}': no level reads it, so nothing comes of it. Its graph:\n{graph}"
        for name in graph.levels
        if name not in read and name not in told and name not in graph.tops
    ]
    for level in levels:
        found += _unseen(level) or ([] if level.name in graph.tops else blind(level))
    return found


def _unseen(level: Level) -> list[str]:
    """Say which levels a response knows nothing of, though the level's start, optimizer or projection reads them."""
    # An optimizer's settings leave a converged solution where it is. So does a start, and is meant to where the
    # loss reads the same level (a proximal term).
    starts = {name for name in level.start_levels if name not in level.cost_levels}
    # What an outside solver reads, the loss reads too.
    settings = {*level.project_levels, *(() if level.has_solver else level.optimizer_levels)}
    for response in level.responses:
        unseen = set() if response.follows_start else starts
        if response.requires == "solution" and not response.sees_step:
            unseen = unseen | settings
        if unseen:
            return [
                f"level '{level.name}': {compact(response)} does not look at what its init, optimizer or projection "
                f"reads of {listing(sorted(unseen))}, so nothing of a hypergradient comes through that; use ITD(), "
                "which follows the inner steps, or, for a projection, AID(…, curvature='fixed_point')."
            ]
    return []


def blind(level: Level) -> list[str]:
    """Say that a response takes a level's solution to be free, though the level has a projection.

    At y* = P(y* − η∇_y g) an active constraint leaves ∇_y g ≠ 0; −∇²_xy g H⁻¹v is the response without the constraint.

    Args:
        level: the level.

    Returns:
        A sentence for the first such response, if there is one.
    """
    if level.project is None:
        return []
    for response in level.responses:
        sees = response.sees_step or response.requires != "solution" or (response.steps_again and not level.has_solver)
        if not sees:
            remedy = (
                "give the level an optimizer and steps in place of its solver, with AID(GMRES(…), curvature='fixed_point')"
                if level.has_solver
                else "use AID(GMRES(…), curvature='fixed_point'), ITD() or Penalty(…), which see the projection"
            )
            return [
                f"level '{level.name}': {compact(response)} does not see project=: where it holds the solution back, the "
                f"response is that of the problem without the constraint. {remedy[0].upper()}{remedy[1:]}; or ignore this "
                "warning if no constraint is active at the solution."
            ]
    return []


def inexact(graph: Graph) -> list[str]:
    """Say where the products along paths differ from the total derivative.

    Args:
        graph: the program's graph.

    Returns:
        One sentence, with the remedy, if there is such a level; else nothing.
    """
    spoilt = [exact for name in graph.levels if not (exact := graph.exact(name))]
    if not spoilt:
        return []
    return [
        f'composition="paths" is not the total derivative here: {"; ".join(map(str, spoilt))}. Use composition="nested" for '
        "the total derivative; or ignore this warning if eq. 2 of Betty's paper is what you want."
    ]
