"""A tape divided into what is computed once, what runs forward and what runs back.

Of the inputs some vary from call to call, some are the same for a whole loop, and some are cotangents, which come last.
Three parts follow from that: what depends on nothing that varies is made once (loop-invariant code motion); what depends on
no cotangent runs forward; the rest runs back, and what it needs of the forward part is kept between the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcmlo.recording.tape import Instruction, Place, Ref, Tape


@dataclass(frozen=True, eq=False)
class Parts:
    """A tape's three parts.

    Attributes:
        once: what depends on nothing that varies.
        forward: what depends on no cotangent.
        backward: the rest.
        outside: the numbers of what is the same for a whole loop: fixed inputs and constants.
        results: the outputs of the forward part.
        products: the outputs of the backward part.
        kept: the numbers of what the forward part leaves to the backward part.
        draws: whether random numbers are drawn.
    """

    once: list[Instruction]
    forward: list[Instruction]
    backward: list[Instruction]
    outside: list[int]
    results: Sequence[Ref | None]
    products: Sequence[Ref | None]
    kept: list[int]
    draws: bool


def split(tape: Tape, varying: int, fixed: int, results: int) -> Parts | str:
    """Divide a tape.

    Args:
        tape: its inputs are `varying` ones, then `fixed` ones, then cotangents.
        varying: how many inputs vary from call to call.
        fixed: how many are the same for a whole loop.
        results: how many of its outputs, the first ones, depend on no cotangent.

    Returns:
        The parts; or the reason why it cannot be replayed.
    """
    places = tape.places()
    where = [place.storage for place in places]
    outside = {*range(varying, varying + fixed), *tape.constants}
    tape = simplified(tape, places)
    written = [{where[n] for n in written_by(one)} for one in tape.instructions]
    mutated = set[int]().union(*written)
    if mutated & {where[n] for n in (*range(tape.inputs), *tape.constants)}:
        return "it writes to what it is given"
    invariant, late, early = set(outside), set(range(varying + fixed, tape.inputs)), set(range(varying))
    once, forward, backward = list[Instruction](), list[Instruction](), list[Instruction]()
    for one in _live(tape, written, where):
        taken, given = taken_by(one), given_by(one)
        here = {where[n] for n in (*taken, *given)}
        if not late.isdisjoint(taken):
            if {where[n] for n in written_by(one)} & {where[n] for n in early}:
                return "its derivative writes to what is kept for it"
            late.update(given)
            backward.append(one)
        elif not draws(one) and mutated.isdisjoint(here) and invariant.issuperset(taken):
            invariant.update(given)
            once.append(one)
        else:
            early.update(given)
            forward.append(one)
    products = tape.outputs[results:]
    needed = {n for one in backward for n in taken_by(one)} | {ref.number for ref in products if ref is not None}
    for one in reversed(forward):  # a view is made again rather than kept
        if needed.intersection(given_by(one)) and _is_view(one, where):
            backward.insert(0, one)
            needed = needed.difference(given_by(one)).union(taken_by(one))
    assert not any(ref is not None and ref.number in late for ref in tape.outputs[:results])
    kept = sorted(needed & early)
    chance = any(map(draws, (*forward, *backward)))
    return Parts(once, forward, backward, sorted(outside), tape.outputs[:results], products, kept, chance)


_FORM = {"ones_like", "zeros_like", "full_like", "new_zeros", "new_ones", "new_full"}
"""Operations that look at a tensor's form alone, which is the same at every call."""


def _is_view(instruction: Instruction, where: Sequence[int]) -> bool:
    taken, given = taken_by(instruction), given_by(instruction)
    return len(taken) == 1 == len(given) and taken != given and where[taken[0]] == where[given[0]]


def simplified(tape: Tape, places: Sequence[Place]) -> Tape:
    """Return a tape without operations that give what they take, as `detach` does and a `view` of the same shape.

    Where an operation looks at a tensor's form alone, an empty tensor of that form stands in.
    """
    same: dict[int, Ref] = {}
    known: dict[
        tuple[int, Place], Ref
    ] = {}  # by the tensor viewed: two inputs may share memory in one call, not in the next
    viewed: dict[int, int] = {}

    def renamed(value: Any) -> Any:
        if isinstance(value, Ref):
            return same.get(value.number, value)
        return type(value)(map(renamed, value)) if type(value) in (list, tuple) else value

    kept = list[Instruction]()
    for one in tape.instructions:
        one = Instruction(one.operation, renamed(one.args), {k: renamed(x) for k, x in one.kwargs.items()}, one.results)
        source, result = (one.args[0] if one.args else None), one.results
        if isinstance(source, Ref) and isinstance(result, Ref) and not written_by(one):
            place, new = places[source.number], places[result.number]
            if place.storage == new.storage:
                viewed[result.number] = root = viewed.get(source.number, source.number)
                known.setdefault((root, places[root]), Ref.of(root))
                if new == place or (root, new) in known:
                    same[result.number] = source if new == place else known[root, new]
                    continue
                known[root, new] = result
            if one.operation.overloadpacket.__name__ in _FORM:
                form = torch.empty_strided(
                    place.kind.shape, place.kind.stride, dtype=place.kind.dtype, device=place.kind.device
                )
                one = one._replace(args=(form, *one.args[1:]))
        kept.append(one)
    return replace(tape, instructions=tuple(kept), outputs=tuple(renamed(tape.outputs)))


def draws(instruction: Instruction) -> bool:
    """Say whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in instruction.operation.tags


def _live(tape: Tape, written: Sequence[set[int]], where: Sequence[int]) -> list[Instruction]:
    """The instructions that anything comes of: results, memory that a later one reads, or the next random number."""
    needed = {ref.number for ref in tape.outputs if ref is not None}
    memory = {where[n] for n in needed}
    live = list[Instruction]()
    for one, writes in zip(reversed(tape.instructions), reversed(written), strict=True):
        if draws(one) or needed.intersection(given_by(one)) or writes & memory:
            live.append(one)
            needed.update(taken_by(one))
            memory.update(where[n] for n in taken_by(one))
    return live[::-1]


def refs(value: Any) -> Iterator[Ref]:
    """Go through the refs in what an instruction takes or gives."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from refs(x)


def taken_by(instruction: Instruction) -> list[int]:
    """Return the numbers of what an instruction takes."""
    return [ref.number for ref in refs([*instruction.args, *instruction.kwargs.values()])]


def given_by(instruction: Instruction) -> list[int]:
    """Return the numbers of what it gives."""
    return [ref.number for ref in refs(instruction.results)]


def written_by(instruction: Instruction) -> list[int]:
    """Return the numbers of what it writes to."""
    schema = instruction.operation._schema
    found: list[int] = []
    for place, argument in enumerate(schema.arguments if schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = instruction.args[place] if place < len(instruction.args) else instruction.kwargs.get(argument.name)
            found += [ref.number for ref in refs([value])]
    return found
