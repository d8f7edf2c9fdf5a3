"""Independent references: finite differences with their own error, dense formulas, bit-exactness."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcmlo import _tree
from funcmlo.operators import ravel, unravel


def finite_difference(function: Callable[[object], Tensor], at: object, step: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return the gradient of a scalar function of a tree by extrapolated central differences, and its error.

    D(h) = [f(x + h e) − f(x − h e)] / 2h has error O(h²); (4 D(h/2) − D(h)) / 3 has O(h⁴). The error estimate is
    what the extrapolation changed, which bounds it from above wherever f is smooth at this scale, and rounding: a few
    ε |f| / h.
    """
    x = ravel(at)
    epsilon = torch.finfo(x.dtype).eps

    def value(shift: Tensor) -> Tensor:
        return function(unravel(x + shift, at))

    gradient, error = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = 1.0
        coarse = (value(step * e) - value(-step * e)) / (2 * step)
        fine = (value(step / 2 * e) - value(-step / 2 * e)) / step
        gradient[i] = (4 * fine - coarse) / 3
        error[i] = (gradient[i] - fine).abs() + 16 * epsilon * value(0 * e).abs() / step
    return gradient, error


def is_fine(reference: Tensor, error: Tensor | float) -> bool:
    """Say whether a reference is known well enough to show anything: to 1e-4 of its size."""
    return bool(torch.as_tensor(error).max() <= 1e-4 * torch.linalg.vector_norm(reference) + 1e-9)


def assert_agrees(
    answer: object, reference: Tensor, error: Tensor | float = 0.0, relative: float = 1e-6, size: Tensor | float = 0.0
) -> None:
    """Hold a tree against a flat reference: to a relative accuracy of the whole vector, or the reference's own error.

    `size` is the size of the terms that the answer is a sum of, where they may cancel: rounding is relative to them.
    A reference whose own error exceeds 1e-4 of it can show nothing, and fails.
    """
    answer = ravel(answer)
    assert answer.shape == reference.shape
    assert torch.isfinite(answer).all()
    assert is_fine(reference, error), "the reference is too coarse"
    allowed = relative * max(float(torch.linalg.vector_norm(reference)), float(size)) + torch.as_tensor(error)
    assert ((answer - reference).abs() <= allowed).all(), (
        f"off by {(answer - reference).abs().max():.3g}, allowed {torch.as_tensor(allowed).max():.3g}"
    )


def dense_implicit(loss: Callable[..., Tensor], params: object, inputs: dict[str, object], v: object) -> dict[str, Tensor]:
    """Return −(∂²g/∂y∂x)ᵀ H⁻¹ v for every input from dense matrices (torch.func.hessian on flat vectors)."""
    y = ravel(params)
    hessian = torch.func.jacrev(torch.func.grad(lambda at: loss(unravel(at, params), inputs)))(y)
    w = torch.linalg.solve(hessian, ravel(v))
    answers = {}
    for name, tree in inputs.items():

        def inner_product(x: Tensor, name: str = name, tree: object = tree) -> Tensor:
            moved = {**inputs, name: unravel(x, tree)}
            return torch.func.grad(lambda at: loss(unravel(at, params), moved))(y) @ w

        answers[name] = -torch.func.grad(inner_product)(ravel(tree))
    return answers


def fingerprint(tree: object) -> list[tuple[int, bytes]]:
    """Return every tensor's version counter and bits."""
    leaves = [x for x in _tree.leaves(tree) if isinstance(x, Tensor)]
    return [(x._version, x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()) for x in leaves]


def bits(tree: object) -> list[bytes]:
    """Return every tensor's bits."""
    return [content for _, content in fingerprint(tree)]
