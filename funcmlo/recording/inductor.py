"""A divided tape compiled by torch's inductor: each part one graph, without Python, without guards."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from funcmlo.recording.code import Make
from funcmlo.recording.matrix_products import faster
from funcmlo.recording.replay import Parts, given_by, taken_by
from funcmlo.recording.tape import Instruction, Kind, Ref

Built = Callable[[list[Tensor]], Sequence[Any]]


def compiled(parts: Parts, varying: int, cotangents: Sequence[int], kinds: Sequence[Kind]) -> Make:
    """Compile a tape's parts.

    Args:
        parts: the parts.
        varying: how many inputs vary.
        cotangents: the numbers of the cotangents.
        kinds: every number's kind.

    Returns:
        The function that makes functions, as `code` returns it.

    Raises:
        Exception: whatever the compiler comes upon.
    """
    forward_takes, backward_takes = _needs(parts.forward, parts.results), _needs(parts.backward, parts.products)
    own, kept = set(range(varying)), set(parts.kept)
    shared = sorted(((forward_takes - own) | (backward_takes - kept)) - set(cotangents))
    made = {n for one in parts.once for n in given_by(one)}
    late = [n for n in shared if n in made]
    once = _built(parts.once, parts.outside, late, kinds) if late else None
    results = [None if ref is None else ref.number for ref in parts.results]
    products = [None if ref is None else ref.number for ref in parts.products]
    into = [n for n in shared if n in forward_takes]
    forward = _built(parts.forward, [*range(varying), *into], [*results, *parts.kept], kinds)
    back = [n for n in shared if n in backward_takes]
    backward = _built(parts.backward, [*parts.kept, *cotangents, *back], products, kinds) if products else None
    n = len(results)

    def make(outside: Sequence[Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        values = dict(zip(parts.outside, outside, strict=True))
        if once is not None:
            values |= zip(late, once(list(outside)), strict=True)
        ahead, behind = [values[m] for m in into], [values[m] for m in back]

        def run_forward(*varying: Tensor) -> tuple[Sequence[Any], Sequence[Any]]:
            found = forward([*varying, *ahead])
            return found[:n], found[n:]

        def run_backward(kept: Sequence[Any], *cotangents: Tensor) -> Sequence[Any]:
            return () if backward is None else backward([*kept, *cotangents, *behind])

        return run_forward, run_backward

    return make


def _needs(instructions: Sequence[Instruction], results: Sequence[Ref | None]) -> set[int]:
    """The numbers that a part takes from outside of itself."""
    made, needed = set[int](), set[int]()
    for one in instructions:
        needed.update(n for n in taken_by(one) if n not in made)
        made.update(given_by(one))
    return needed | {ref.number for ref in results if ref is not None and ref.number not in made}


def _built(
    instructions: Sequence[Instruction], inputs: Sequence[int], outputs: Sequence[int | None], kinds: Sequence[Kind]
) -> Built:
    """One part as a compiled function of a list; where there is nothing to compute, it hands on what it is given."""
    if not instructions:
        places = {n: i for i, n in enumerate(inputs)}
        order = [None if n is None else places[n] for n in outputs]
        return lambda given: [None if i is None else given[i] for i in order]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler's own modules still use
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
    module = graph(instructions, inputs, outputs, kinds)
    examples = [_example(kinds[n]) for n in inputs]
    # Channels-last convolutions would be transposed back and forth, since parameters and batches come as they are.
    # Threads that wait for each other cost more than a loop over a few thousand numbers.
    settings: dict[str, Any] = {"layout_optimization": False, "cpp.min_chunk_size": 2**14}
    settings["triton.cudagraphs"] = any(x.is_cuda for x in examples)
    with torch.no_grad(), warnings.catch_warnings(), config.patch(settings):
        warnings.simplefilter("ignore")
        function: Any = compile_fx(module, examples)

    def run(given: list[Tensor]) -> Sequence[Any]:
        found: Sequence[Any] = function(*given)
        return found

    return run


def graph(
    instructions: Sequence[Instruction], inputs: Sequence[int], outputs: Sequence[int | None], kinds: Sequence[Kind]
) -> fx.GraphModule:
    """Return a part as a graph of torch.fx.

    Args:
        instructions: the part.
        inputs: the numbers that come in.
        outputs: those that go out; None for an output that is None.
        kinds: every number's kind.

    Returns:
        The graph.
    """
    whole = fx.Graph()
    nodes = {n: whole.placeholder(f"v{n}") for n in inputs}
    attributes: dict[str, Tensor] = {}

    def word(value: Any) -> Any:
        if isinstance(value, Ref):
            return nodes[value.number]
        if type(value) in (list, tuple):
            return type(value)(map(word, value))
        if isinstance(value, Tensor):  # stands for its form
            attributes[f"form{len(attributes)}"] = value
            return whole.get_attr(f"form{len(attributes) - 1}")
        return value

    def assign(results: Any, node: fx.Node) -> None:
        if isinstance(results, Ref):
            nodes[results.number] = node
        elif isinstance(results, tuple):
            for i, one in enumerate(results):
                if one is not None:
                    assign(one, whole.call_function(operator.getitem, (node, i)))

    for one in instructions:
        if (found := faster(one, kinds)) is not None:
            assign(one.results, whole.call_function(torch.ops.funcmlo.matrix_product.default, tuple(map(word, found))))
            continue
        arguments = tuple(map(word, one.args)), {name: word(x) for name, x in one.kwargs.items()}
        assign(one.results, whole.call_function(one.operation, *arguments))
    whole.output(tuple(None if n is None else nodes[n] for n in outputs))
    holder = torch.nn.Module()
    for name, value in attributes.items():
        holder.register_buffer(name, value)
    return fx.GraphModule(holder, whole)


def _example(kind: Kind) -> Tensor:
    return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=kind.device).zero_()
