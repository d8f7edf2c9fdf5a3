"""Derivatives by plain autograd and by torch.func: the same numbers, and partial where they must be."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from funcmlo import _diff, _tracing, _tree
from funcmlo.operators import ravel
from tests.registry import structures, vector_like


def cost(y: object, x: object) -> tuple[torch.Tensor, dict[str, object]]:
    a, b = ravel(y).double(), ravel(x).double()
    value = torch.sin(a).sum() * torch.cos(b).sum() + (a**3).sum()
    return value, {"norm": (a**2).sum(), "label": "seen"}


def under_vmap(function):
    """Run a function inside a transform that changes nothing: vmap over a batch of one."""
    box = {}

    def mapped(_):
        box["transforming"] = _tracing.transforming()
        return [leaf for leaf in _tree.leaves(function()) if isinstance(leaf, torch.Tensor)]

    answer = torch.func.vmap(mapped)(torch.zeros(1))
    assert box["transforming"]
    return [leaf[0] for leaf in answer]


@given(y=structures(), x=structures(), seed=st.integers(0, 2**20))
def test_both_ways_agree_with_torch_func(y: object, x: object, seed: int) -> None:
    y, x = vector_like(y, seed), vector_like(x, seed + 1)
    flat_y, flat_x = ravel(y).double(), ravel(x).double()
    expected = torch.func.grad(lambda a, b: cost(a, b)[0], argnums=(0, 1))(flat_y, flat_x)

    with torch.no_grad():  # as a program runs where nothing is recorded
        value, extra, grads, _ = _diff.value_and_grads(cost, [y, x])
    assert not value.requires_grad
    assert not extra["norm"].requires_grad
    assert extra["label"] == "seen"
    for got, want in zip(grads, expected, strict=True):
        assert torch.allclose(ravel(got).double(), want, rtol=1e-12, atol=1e-12)
    mapped = under_vmap(lambda: _diff.value_and_grads(cost, [y, x])[2])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(mapped, _tree.leaves(grads), strict=True))


@given(seed=st.integers(0, 2**20))
def test_products_with_a_gradients_jacobian(seed: int) -> None:
    y, x, u = (vector_like({"a": torch.zeros(2).double(), "b": torch.zeros(()).double()}, seed + i) for i in range(3))

    def gradient(at: object, other: object) -> tuple[object, None]:
        return _diff.value_and_grads(lambda z: cost(z, other), [at])[2][0], None

    def flat_gradient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda z: cost(z, b)[0])(a)

    _, pull = torch.func.vjp(flat_gradient, ravel(y), ravel(x))
    expected = pull(ravel(u))
    value, _, pullback = _diff.vjp(gradient, [y, x])
    assert torch.allclose(ravel(value), flat_gradient(ravel(y), ravel(x)))
    for _ in range(2):  # the graph is kept
        for got, want in zip(pullback(u), expected, strict=True):
            assert torch.allclose(ravel(got), want, rtol=1e-12)
    assert torch.allclose(ravel(pullback(u, wrt=[1])[0]), expected[1], rtol=1e-12)
    mapped = under_vmap(lambda: _diff.vjp(gradient, [y, x])[2](u))
    assert all(torch.allclose(a, b) for a, b in zip(mapped, _tree.leaves(pullback(u)), strict=True))


def test_derivatives_are_partial_even_for_one_tensor_in_two_places() -> None:
    same = torch.tensor([2.0])
    _, _, (first, second), _ = _diff.value_and_grads(lambda y, x: ((y**2 * x).sum(), None), [same, same])
    assert torch.equal(first, torch.tensor([8.0]))
    assert torch.equal(second, torch.tensor([4.0]))

    def through(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        # y is computed from x, and ∂/∂y must not see x through it.
        return _diff.value_and_grads(lambda y: ((y**2 * x).sum(), None), [x])[2][0], None

    value, _, pullback = _diff.vjp(through, [same])
    assert torch.equal(value, torch.tensor([8.0]))  # 2yx at y = x = 2
    assert torch.equal(pullback(torch.ones(1))[0], torch.tensor([8.0]))  # d(2x²)/dx = 4x


def test_what_does_not_depend_is_zero_and_known() -> None:
    y, x = torch.ones(2), {"a": torch.ones(3)}
    _, _, grads, used = _diff.value_and_grads(lambda y, x: (y.sum(), None), [y, x])
    assert used == (True, False)
    assert torch.equal(grads[1]["a"], torch.zeros(3))
    _, _, grads, used = _diff.value_and_grads(lambda y, x: (torch.tensor(1.0), None), [y, x])
    assert used == (False, False)
    _, _, pullback = _diff.vjp(lambda y: (torch.ones(2), None), [y])
    assert torch.equal(pullback(torch.ones(2))[0], torch.zeros(2))


def test_transforms_that_differentiate_are_told_from_vmap() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append((_tracing.transforming(), _tracing.differentiating())) or x)(torch.zeros(2))
    torch.func.grad(lambda x: seen.append((_tracing.transforming(), _tracing.differentiating())) or x)(torch.zeros(()))
    assert seen == [(True, False), (True, True)]
    assert not _tracing.transforming()
