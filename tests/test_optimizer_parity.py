"""Every optimizer of torchopt's, mended and by its maker here: torch.optim's numbers, and derivatives of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor
from torchopt.schedule import exponential_decay, linear_schedule, polynomial_schedule

from funcmlo import _tree, optim
from funcmlo.operators import ravel
from tests.oracles import assert_agrees, bits, fingerprint, finite_difference

# By name: the maker, its settings, torch.optim's settings where they are called or defined otherwise. torch.optim's eps is
# 1e-8 for RAdam and Adamax, its lr 1 for Adadelta; all are given.
SAME: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "sgd": ("sgd", {"weight_decay": 0.1}, "SGD", {}),
    "momentum": ("sgd", {"momentum": 0.8, "weight_decay": 0.1}, "SGD", {}),
    "dampened": ("sgd", {"momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1}, "SGD", {}),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}, "SGD", {}),
    "sgd ascending": ("sgd", {"momentum": 0.5, "maximize": True, "weight_decay": 0.1}, "SGD", {}),
    "adam": ("adam", {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}, "Adam", {}),
    "adam at its defaults": ("adam", {}, "Adam", {}),
    "adam without momentum": ("adam", {"betas": (0.0, 0.95)}, "Adam", {}),
    "adam ascending": ("adam", {"maximize": True, "weight_decay": 0.1}, "Adam", {}),
    "adamw": ("adamw", {"weight_decay": 0.2}, "AdamW", {}),
    "adamw ascending": ("adamw", {"weight_decay": 0.2, "maximize": True}, "AdamW", {}),
    "adamax": ("adamax", {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-8}, "Adamax", {}),
    "radam": ("radam", {"betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-8}, "RAdam", {}),
    "radam at its defaults": ("radam", {"eps": 1e-8}, "RAdam", {}),
    "rmsprop": ("rmsprop", {"alpha": 0.9, "weight_decay": 0.1, "eps": 1e-6}, "RMSprop", {}),
    "rmsprop with momentum": ("rmsprop", {"momentum": 0.5}, "RMSprop", {}),
    "centered": ("rmsprop", {"centered": True, "momentum": 0.5, "weight_decay": 0.1}, "RMSprop", {}),
    "rmsprop ascending": ("rmsprop", {"maximize": True}, "RMSprop", {}),
    "adagrad": ("adagrad", {"lr_decay": 0.1, "weight_decay": 0.1}, "Adagrad", {}),
    "adagrad from 0.3": ("adagrad", {"initial_accumulator_value": 0.3, "eps": 1e-6}, "Adagrad", {}),
    "adagrad ascending": ("adagrad", {"maximize": True}, "Adagrad", {}),
    "adadelta": ("adadelta", {"rho": 0.8, "eps": 1e-3, "weight_decay": 0.1}, "Adadelta", {}),
}
# torch's own, inside its jvp.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

MAKERS = {"torchopt": torchopt, "funcmlo": optim}
LR = 0.05

SCHEDULES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "linear": (
        linear_schedule(LR, 0.1 * LR, 20),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20),
    ),
    "polynomial": (
        polynomial_schedule(LR, 0.0, 2.0, 20),
        lambda o: torch.optim.lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    ),
    "exponential": (exponential_decay(LR, 0.9), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    "staircase": (
        exponential_decay(LR, 0.5, transition_steps=10, staircase=True),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.5),
    ),
    "late, with an end": (
        exponential_decay(LR, 0.9, transition_begin=5, end_value=0.2 * LR),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: max(0.9 ** max(t - 5, 0), 0.2)),
    ),
    "growing, with an end": (
        exponential_decay(LR, 1.1, end_value=2 * LR),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.1**t, 2.0)),
    ),
    "user's": (lambda t: LR / (1 + t.double()), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t))),
}

START = {"w": torch.tensor([[0.3, -1.0], [2.0, 0.1]]).double(), "b": torch.tensor(0.7).double()}


def gradient(params: Any, x: Tensor | float = 1.0) -> Any:
    """The gradient of a cost that couples its parameters, and bends; no entry comes near zero along the way."""
    pull = torch.tanh(sum(p.sum() for p in _tree.leaves(params)) * 0.3)
    return _tree.map(lambda p: x * p + 0.3 * torch.sin(3 * p) + pull + 2.0, params)


def trajectory(optimizer: Any, steps: int) -> Any:
    params, state = START, optimizer.init(START)
    for _ in range(steps):
        updates, state = optimizer.update(gradient(params), state, params=params, inplace=False)
        params = optim.apply(params, updates)
    return params


def reference(maker: str, settings: dict[str, Any], scheduler: Callable[[Any], Any] | None = None) -> Any:
    params = {name: p.clone().requires_grad_() for name, p in START.items()}
    optimizer = getattr(torch.optim, maker)(list(params.values()), lr=LR, **settings)
    rate = None if scheduler is None else scheduler(optimizer)
    for _ in range(50):
        for p, g in zip(params.values(), gradient({name: p.detach() for name, p in params.items()}).values(), strict=True):
            p.grad = g
        optimizer.step()
        if rate is not None:
            rate.step()
    return {name: p.detach() for name, p in params.items()}


def assert_same(ours: Any, theirs: Any) -> None:
    # 50 steps, each of a dozen roundings of 1e-16, along maps that stretch differences by at most e^{50 · lr · 2} ≈ 150.
    assert torch.allclose(ravel(ours), ravel(theirs), rtol=1e-11, atol=0.0), (ravel(ours) - ravel(theirs)).abs().max()
    assert (ravel(ours) - ravel(START)).abs().min() > 1e-3


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("name", SAME)
def test_fifty_steps_as_torch_optim_makes_them(name: str, source: str) -> None:
    maker, settings, theirs, _ = SAME[name]
    optimizer = optim.mend(getattr(MAKERS[source], maker)(LR, **settings))
    assert_same(trajectory(optimizer, 50), reference(theirs, settings))


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_as_torch_optim_makes_them(name: str, source: str) -> None:
    schedule, scheduler = SCHEDULES[name]
    optimizer = optim.mend(MAKERS[source].sgd(schedule, momentum=0.5))
    with torch.no_grad():
        assert_same(trajectory(optimizer, 50), reference("SGD", {"momentum": 0.5}, scheduler))


@pytest.mark.parametrize("name", SAME)
def test_a_maker_gives_what_mending_gives(name: str) -> None:
    maker, settings, _, _ = SAME[name]
    ours, mended = getattr(optim, maker)(LR, **settings), optim.mend(getattr(torchopt, maker)(LR, **settings))
    assert bits(trajectory(ours, 5)) == bits(trajectory(mended, 5))


@pytest.mark.parametrize("maker", ["sgd", "adam", "adamw", "adamax", "radam", "rmsprop", "adagrad", "adadelta"])
def test_defaults_are_torchopts(maker: str) -> None:
    first = (LR,) if maker == "sgd" else ()
    mended = trajectory(optim.mend(getattr(torchopt, maker)(*first)), 10)
    assert bits(trajectory(getattr(optim, maker)(*first), 10)) == bits(mended)


def test_torchopts_own_words_are_taken() -> None:
    plain = trajectory(optim.adam(LR), 3)
    words = {"moment_requires_grad": True, "use_accelerated_op": True}
    assert bits(trajectory(optim.adam(LR, **words), 3)) == bits(plain)
    mended = optim.mend(torchopt.adam(LR, **words))
    assert not any(x.requires_grad for x in _tree.leaves(mended.init(START)))
    assert bits(trajectory(mended, 3)) == bits(plain)


# Derivatives. By name a transformation; those that are smooth away from zero gradients.
KINDS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: getattr(torchopt, SAME[name][0])(LR, **SAME[name][1]) for name in SAME},
    **{f"rate {name}": lambda name=name: torchopt.sgd(SCHEDULES[name][0], momentum=0.5) for name in SCHEDULES},
    "adam, flat": lambda: torchopt.adam(LR, eps=0.1),
    "adam, root": lambda: torchopt.adam(LR, eps_root=0.3),
    "adamw, masked": lambda: torchopt.adamw(LR, weight_decay=0.5, mask=lambda p: {"w": True, "b": False}),
    "accelerated": lambda: torchopt.adam(LR, eps=0.1, use_accelerated_op=True),
    "rmsprop, nesterov": lambda: torchopt.rmsprop(LR, momentum=0.5, nesterov=True, initial_scale=0.5),
    "clipped": lambda: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(LR, momentum=0.5)),
    "clipped adam": lambda: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adam(LR, eps=0.1)),
    "nan to num": lambda: torchopt.chain(torchopt.nan_to_num(0.0), torchopt.sgd(LR)),
    "scaled": lambda: torchopt.chain(torchopt.transform.scale(0.5), torchopt.sgd(LR, maximize=True)),
    "decayed": lambda: torchopt.chain(torchopt.transform.add_decayed_weights(0.3), torchopt.sgd(LR)),
}
STEPS = 7  # radam changes its formula at its sixth step


def outcome(optimizer: Any, at: Any) -> Tensor:
    """A curved function of where seven steps lead, as a function of where they begin and of a coefficient."""
    params, state = at["start"], optimizer.init(at["start"])
    for _ in range(STEPS):
        updates, state = optimizer.update(gradient(params, at["x"]), state, params=params)
        params = optim.apply(params, updates)
    return sum((torch.sin(p) * (p + 1)).sum() for p in _tree.leaves(params))


AT = {"start": START, "x": torch.tensor(1.2).double()}
ALONG = {
    "start": {"w": torch.tensor([[0.5, 1.0], [-0.3, 0.2]]).double(), "b": torch.tensor(-1.0).double()},
    "x": torch.tensor(0.6).double(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_unrolls_are_differentiated_in_every_way(kind: str) -> None:
    optimizer = optim.mend(KINDS[kind]())

    def f(at: Any) -> Tensor:
        return outcome(optimizer, at)

    expected, error = finite_difference(f, AT)
    reverse = torch.func.grad(f)(AT)
    # The differences' own error is in `error`; beside it there is rounding alone.
    assert_agrees(reverse, expected, error, relative=1e-9)
    _, forward = torch.func.jvp(f, (AT,), (ALONG,))
    assert torch.allclose(forward, _tree.dot(reverse, ALONG), rtol=1e-10, atol=1e-12)

    def slope(at: Any) -> Tensor:
        return _tree.dot(torch.func.grad(f)(at), ALONG)

    expected, error = finite_difference(lambda s: slope(_tree.add_scaled(AT, s, ALONG)), torch.zeros(()).double())
    twice = torch.func.grad(slope)(AT)
    assert_agrees(_tree.dot(twice, ALONG), expected, error, relative=1e-9)
    # Forward over reverse is the same matrix from the other side.
    assert_agrees(torch.func.jvp(torch.func.grad(f), (AT,), (ALONG,))[1], ravel(twice), relative=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_gives_what_a_loop_gives(kind: str) -> None:
    optimizer = optim.mend(KINDS[kind]())
    many = {"w": torch.stack([START["w"], START["w"] - 0.5, START["w"] ** 2]), "b": torch.tensor([0.7, 0.1, -0.2]).double()}
    state = optimizer.init(START)

    def step(params: Any, state: Any) -> Any:
        updates, state = optimizer.update(gradient(params), state, params=params)
        return optim.apply(params, updates), state

    mapped = torch.func.vmap(step, in_dims=(0, None))(many, state)  # a state that all share
    one = [step({name: p[i] for name, p in many.items()}, state) for i in range(3)]
    for _ in range(STEPS):
        for i in range(3):
            # A few roundings a step; vmap picks other kernels.
            assert torch.allclose(ravel(_tree.map(lambda x, i=i: x[i], mapped[0])), ravel(one[i][0]), rtol=1e-12, atol=1e-13)
        mapped = torch.func.vmap(step)(*mapped)  # from states of their own
        one = [step(*each) for each in one]


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_pure(kind: str) -> None:
    optimizer = optim.mend(KINDS[kind]())
    params, state = START, optimizer.init(START)
    for _ in range(3):
        grads = gradient(params)
        before = fingerprint((params, grads, state))
        first = optimizer.update(grads, state, params=params)
        assert bits(first) == bits(optimizer.update(grads, state, params=params))
        assert fingerprint((params, grads, state)) == before
        updates, state = first
        params = optim.apply(params, updates)
    # What the state holds can be mapped.
    assert all(isinstance(x, Tensor) for x in _tree.leaves(state))


ROOTED = [kind for kind in KINDS if SAME.get(kind, ("sgd",))[0] != "sgd"] + ["adam, root", "adam, flat", "clipped adam"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ROOTED)
def test_dead_units_have_finite_derivatives(kind: str, dtype: torch.dtype) -> None:
    optimizer = optim.mend(KINDS[kind]())
    start = {"w": torch.tensor([[0.3, -1.0], [2.0, 0.1]], dtype=dtype), "b": torch.tensor(0.7, dtype=dtype)}
    alive = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=dtype)

    def f(x: Tensor) -> Tensor:
        params, state = start, optimizer.init(start)
        for _ in range(STEPS):
            grads = gradient(params, x)
            grads = {"w": grads["w"] * alive, "b": grads["b"] * 0}
            updates, state = optimizer.update(grads, state, params=params)
            params = optim.apply(params, updates)
        return params["w"].sum() + params["b"]

    x = torch.tensor(1.2, dtype=dtype)
    first, second = torch.func.grad(f)(x), torch.func.grad(torch.func.grad(f))(x)
    forward = torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    forward = forward.to(dtype)  # torch's forward mode widens a 0-d tensor times a number
    assert torch.isfinite(torch.stack([first, second, forward])).all()
    relative = 1e-9 if dtype == torch.float64 else 1e-4
    assert torch.allclose(forward, first, rtol=relative, atol=relative)
    if dtype == torch.float64:
        expected, error = finite_difference(f, x)
        # Where the gradient's sign decides alone, the derivative is of the size of ε: rounding is relative to the cost.
        assert_agrees(first, expected, error, relative=1e-9, size=1e-3)


@pytest.mark.parametrize("maker", ["adam", "adagrad", "rmsprop", "radam", "adamax", "adadelta"])
def test_the_derivative_at_a_zero_gradient_is_the_true_one(maker: str) -> None:
    # At g = 0 the update is g/ε and the like; differences much smaller than ε see it.
    eps = 1e-4
    optimizer = optim.mend(getattr(torchopt, maker)(1.0, eps=eps))
    state = optimizer.init(torch.zeros(1).double())

    def f(g: Tensor) -> Tensor:
        return optimizer.update(g, state)[0].sum()

    g = torch.zeros(1).double()
    h = torch.tensor([1e-9]).double()
    # d(g / (c |g| + ε)) differs from g/ε by c h / ε relative, c ≤ 1.
    assert torch.allclose(torch.func.grad(f)(g), (f(h) - f(-h)) / (2 * h), rtol=1e-4)


@pytest.mark.parametrize("size", [1e-14, 1e-20, 1e-25, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("maker", ["adam", "adagrad", "rmsprop", "radam"])
def test_tiny_gradients_have_the_derivative_of_zero_ones(maker: str, size: float) -> None:
    # In float32 the second moment of 1e-20 is subnormal and that of 1e-25 zero; ε absorbs them all.
    optimizer = optim.mend(getattr(torchopt, maker)(1.0))
    state = optimizer.init(torch.zeros(1))

    def f(g: Tensor) -> Tensor:
        for_one, after = optimizer.update(g, state)
        return for_one.sum() + optimizer.update(g / 2, after)[0].sum()

    assert torch.allclose(torch.func.grad(f)(torch.full((1,), size)), torch.func.grad(f)(torch.zeros(1)), rtol=1e-3)
