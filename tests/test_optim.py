"""Mended optimizers: the same numbers as torch.optim, pure, and differentiable."""

from __future__ import annotations

import pytest
import torch
import torchopt
from torch import Tensor

import funcmlo as fm
from funcmlo import _tree, optim
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, fingerprint, finite_difference
from tests.programs import SGD
from tests.registry import OPTIMIZERS

PARITY = {
    "sgd": (torchopt.sgd(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (torchopt.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "dampened": (
        torchopt.sgd(0.1, momentum=0.9, dampening=0.4),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.4),
    ),
    "nesterov": (
        torchopt.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adam": (torchopt.adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "adam without momentum": (
        torchopt.adam(0.1, betas=(0.0, 0.999)),
        lambda p: torch.optim.Adam(p, 0.1, betas=(0.0, 0.999)),
    ),
    "adamw": (torchopt.adamw(0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    "rmsprop": (torchopt.rmsprop(0.1), lambda p: torch.optim.RMSprop(p, 0.1)),
    "adagrad": (torchopt.adagrad(0.1), lambda p: torch.optim.Adagrad(p, 0.1)),
}


def gradient(p: Tensor, t: int) -> Tensor:
    return p + 0.2 * torch.sin(3 * p) + 0.01 * t


@pytest.mark.parametrize("name", PARITY)
def test_fifty_steps_as_torch_optim_makes_them(name: str) -> None:
    functional, make = PARITY[name]
    params = {"a": torch.tensor([0.3, -1.0, 2.0]).double(), "b": torch.tensor(0.7).double()}
    theirs = {k: v.clone().requires_grad_() for k, v in params.items()}
    reference = make(list(theirs.values()))
    optimizer = optim.mend(functional)
    state = optimizer.init(params)
    for t in range(50):
        updates, state = optimizer.update({k: gradient(p, t) for k, p in params.items()}, state, params=params)
        params = optim.apply(params, updates)
        for p in theirs.values():
            p.grad = gradient(p.detach(), t)
        reference.step()
    for k, p in params.items():
        # 50 steps of rounding at ε = 2e-16; the maps contract, or nearly, on this gradient of slope in [0.4, 1.6].
        assert torch.allclose(p, theirs[k].detach(), rtol=1e-11, atol=1e-12), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_pure(name: str) -> None:
    optimizer = optim.mend(OPTIMIZERS[name]())
    params = {"a": torch.tensor([0.3, -1.0]).double()}
    state = optimizer.init(params)
    for t in range(3):
        grads = {"a": gradient(params["a"], t)}
        before = fingerprint((params, grads, state))
        first = optimizer.update(grads, state, params=params)
        second = optimizer.update(grads, state, params=params)
        assert bits(first) == bits(second)
        assert fingerprint((params, grads, state)) == before
        updates, state = first
        params = optim.apply(params, updates)


def test_momentum_of_a_restored_run_goes_on() -> None:
    # torchopt's own momentum remembers in a closure whether it was called, and drops the trace of a restored state.
    params, grads = torch.zeros(2), torch.ones(2)
    optimizer = optim.mend(torchopt.sgd(1.0, momentum=0.5))
    _, state = optimizer.update(grads, optimizer.init(params), params=params)
    restored = optim.mend(torchopt.sgd(1.0, momentum=0.5))
    assert torch.equal(restored.update(grads, state, params=params)[0], torch.full((2,), -1.5))


@pytest.mark.parametrize("order", [2.0, 1.0, torch.inf, 3.0])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_clipping_is_differentiated(order: float, size: float) -> None:
    clip = optim.mend(torchopt.clip.clip_grad_norm(1.0, norm_type=order))
    theirs = torchopt.clip.clip_grad_norm(1.0, norm_type=order)
    grads = {"a": size * torch.tensor([1.0, -2.0]).double(), "b": size * torch.tensor(0.5).double()}
    assert all(
        torch.allclose(x, y, rtol=1e-6)
        for x, y in zip(*(_tree.leaves(c.update(grads, (), inplace=False)[0]) for c in (clip, theirs)), strict=True)
    )
    weights = {"a": torch.tensor([0.3, 1.0]).double(), "b": torch.tensor(-2.0).double()}

    def value(g: object) -> Tensor:
        return _tree.dot(clip.update(g, ())[0], weights)

    reference, error = finite_difference(value, grads, step=1e-3 * size)
    leaves = {k: g.clone().requires_grad_() for k, g in grads.items()}
    answer = torch.autograd.grad(value(leaves), list(leaves.values()))
    assert_agrees(list(answer), reference, error)


def test_clipping_a_zero_gradient_has_a_derivative() -> None:
    clip = optim.mend(torchopt.clip.clip_grad_norm(1.0))
    g = torch.zeros(3, requires_grad=True)
    (first,) = torch.autograd.grad(clip.update(g, ())[0].sum(), g, create_graph=True)
    assert torch.equal(first, torch.ones(3))
    (second,) = torch.autograd.grad(first.sum(), g)
    assert torch.equal(second, torch.zeros(3))


def test_clipping_a_non_finite_gradient_raises_where_asked() -> None:
    clip = optim.mend(torchopt.clip.clip_grad_norm(1.0, error_if_nonfinite=True))
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        clip.update(torch.tensor([torch.inf]), ())


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "rmsprop", "centered", "adagrad", "adadelta", "adamax"])
def test_zero_second_moments_have_a_derivative(name: str) -> None:
    make = {"centered": lambda lr: torchopt.rmsprop(lr, centered=True)}.get(name, getattr(torchopt, name, None))
    optimizer = optim.mend(make(0.1))
    params = torch.ones(2).double()
    x = torch.tensor([0.0, 1.0]).double().requires_grad_()
    state = optimizer.init(params)
    for _ in range(7):  # radam changes its formula at its sixth step
        updates, state = optimizer.update(x * torch.tensor([0.0, 2.0]), state, params=params)
    (answer,) = torch.autograd.grad(updates.sum(), x)
    assert torch.isfinite(answer).all()
    assert answer[0] == 0.0


def test_values_are_torchopts() -> None:
    # To the rounding of one operation or two. Of radam, whose ρ_t − 4 ≈ 2 is a difference of 1999 and 1993, torchopt takes
    # the latter from 1 − β₂^t ≈ 0.006: 2000/2 · 1e-16/0.006 = 2e-11. Adam differs by what float32 loses in torchopt's own.
    for name in ("radam", "rmsprop", "adagrad", "adadelta", "adamax", "sgd"):
        ours, theirs = optim.mend(getattr(torchopt, name)(0.1)), getattr(torchopt, name)(0.1)
        params, grads = torch.ones(3).double(), torch.tensor([0.5, -2.0, 0.0]).double()
        mine, reference = ours.init(params), theirs.init(params)
        for _ in range(7):
            a, mine = ours.update(grads, mine, params=params)
            b, reference = theirs.update(grads, reference, params=params, inplace=False)
            assert torch.allclose(a, b, rtol=1e-10 if name == "radam" else 1e-15, atol=0), name


def test_a_transformation_from_elsewhere_is_used_as_it_is_but_never_in_place() -> None:
    seen = []

    def update(g, s, *, params=None, inplace=True):
        seen.append(inplace)
        return -2 * g, s

    own = optim.mend(torchopt.base.GradientTransformation(lambda p: ("own",), update))
    assert own.init(torch.ones(1)) == ("own",)
    assert own.update(torch.ones(1), ("own",)) == (torch.tensor([-2.0]), ("own",))
    assert seen == [False]


def test_masked_parts_are_mended_too() -> None:
    def mask(params):
        return [True, False] if isinstance(params, list) else {"a": True, "b": False}

    clip = torchopt.chain(torchopt.transform.masked(torchopt.clip.clip_grad_norm(0.5), mask), torchopt.sgd(1.0))
    optimizer = optim.mend(clip)
    grads = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.tensor([7.0]).double()}
    state = optimizer.init(grads)
    assert torch.allclose(optimizer.update(grads, state, params=grads)[0]["a"], torch.tensor([-0.3, -0.4]).double())
    assert torch.equal(optimizer.update(grads, state, params=grads)[0]["b"], torch.tensor([-7.0]).double())

    def value(g: object) -> Tensor:
        return optimizer.update(g, state, params=grads)[0]["a"][0]

    reference, error = finite_difference(value, grads)
    leaves = {k: g.clone().requires_grad_() for k, g in grads.items()}
    answer = torch.autograd.grad(value(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert_agrees(list(answer), reference, error)


def test_a_pair_that_knows_neither_params_nor_inplace() -> None:
    pair = torchopt.base.GradientTransformation(lambda params: 0, lambda g, s: (-g, s + 1))
    updates, state = optim.mend(pair).update(torch.ones(1), 0, params=torch.zeros(1))
    assert (float(updates), state) == (-1.0, 1)


def test_a_rate_of_higher_precision_leaves_the_parameters_dtype() -> None:
    p = fm.Multilevel(
        fm.Level("y", lambda y, x: (y**2).sum(), lambda x: torchopt.sgd(x), response=fm.ITD()),
        fm.Level("x", lambda x, y: y.sum(), SGD),
    )
    state = p.init({"y": torch.tensor(1.0), "x": torch.tensor(0.1, dtype=torch.float64)})
    after, _ = p.step(state, {})
    assert after.params["y"].dtype == torch.float32
    assert optim.apply(torch.ones(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.bfloat16


@pytest.mark.parametrize("order", [2.0, 1.0, torch.inf, 3.0])
def test_clipping_scales_as_it_says(order: float) -> None:
    clip = optim.mend(torchopt.clip.clip_grad_norm(1e-4, norm_type=order))
    grads = {"a": torch.tensor([1e-3, 0.0, -2e-3]).double(), "b": torch.zeros(0, 2).double(), "c": torch.zeros(2).double()}
    factor = 1e-4 / (torch.linalg.vector_norm(grads["a"], order) + 1e-6)
    clipped, _ = clip.update(grads, ())
    assert torch.allclose(ravel(clipped), factor * ravel(grads), rtol=1e-12)
    assert clip.update({}, ())[0] == {}
    empty, _ = clip.update(torch.zeros(0), ())
    assert empty.shape == (0,)


def test_adams_second_epsilon_is_under_the_root() -> None:
    # At the first step m̂ = g and v̂ = g².
    optimizer = optim.mend(torchopt.adam(0.1, eps=1e-3, eps_root=0.5))
    params, g = torch.zeros(3).double(), torch.tensor([0.3, -1.0, 0.0]).double()
    updates, _ = optimizer.update(g, optimizer.init(params), params=params)
    assert torch.allclose(updates, -0.1 * g / (torch.sqrt(g**2 + 0.5) + 1e-3), rtol=1e-12)


def clip_grad_norm(max_norm: float) -> torchopt.base.GradientTransformation:
    """A user's own, of the name of torchopt's."""

    def update(g, s, *, params=None, inplace=True):
        return -max_norm * g, s

    return torchopt.base.GradientTransformation(lambda params: (), update)


def test_a_transformation_from_elsewhere_may_have_a_makers_name() -> None:
    assert torch.equal(optim.mend(clip_grad_norm(2.0)).update(torch.ones(1), ())[0], torch.tensor([-2.0]))
