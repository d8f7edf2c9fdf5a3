"""Forward mode through an inner loop: (Jᵀv)_i = ⟨v, J e_i⟩, one product with J for each scalar input."""

from __future__ import annotations

import torch
from torch import Tensor

from funcmlo import _forward, _tracing, _tree
from funcmlo._tree import Tree
from funcmlo.hypergrad.solved import Solved, Standing
from funcmlo.operators import ravel, unravel


def columnwise(solved: Solved, cotangent: Tree, begin: Standing | None, first: int, chunk: int | None) -> dict[str, Tree]:
    """Return (∂y_T/∂x)ᵀ v for every input, the directions mapped by vmap.

    Inside of another map they are taken one after the other: torch's rules for the forward derivatives of `linalg.solve`,
    `det` and their like are wrong under two maps at once, and attention with dropout ends the process.

    Args:
        solved: the loop.
        cotangent: v, a tree like the parameters.
        begin: the standing before the first step that is differentiated; None for the loop's own start.
        first: that step.
        chunk: how many directions are taken at once; None for all, 1 for a plain loop.

    Returns:
        The cotangents by input name.

    Raises:
        EstimatorError: something in the inner steps has no forward derivative.
    """
    size = _tree.size(solved.inputs)
    if not size or not _tree.leaves(cotangent):
        return dict(_tree.zeros_like(solved.inputs))

    def ending(inputs: dict[str, Tree]) -> Tree:
        y, s = solved.start(inputs) if begin is None else begin
        for t in range(first, solved.steps):
            y, s = solved.update(y, s, inputs, t)
        return y

    def component(direction: Tensor) -> Tensor:
        return _tree.dot(cotangent, _forward.jvp(ending, solved.inputs, unravel(direction, solved.inputs)))

    basis = torch.eye(size, dtype=_tree.precision(solved.inputs), device=_tree.leaves(solved.inputs)[0].device)
    with torch.no_grad():
        if chunk == 1 or _tracing.mapping():
            components = torch.stack([component(direction) for direction in basis])
        else:
            components = torch.func.vmap(component, randomness="same", chunk_size=chunk)(basis)
    return dict(unravel(components.to(ravel(solved.inputs).dtype), solved.inputs))
