"""Optimizers are described as one would write them, and nothing that comes in is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torchopt
from torchopt.base import GradientTransformation

from funcmlo.describe import describe

DECAY = torchopt.schedule.linear_schedule(1e-3, 1e-4, 100, 0)


class Mine:
    def init(self, params: Any) -> Any:
        return ()

    def update(self, updates: Any, state: Any) -> Any:
        return updates, state


class Breaks(Mine):
    @property
    def update(self) -> Any:
        raise RuntimeError("never looked at")


def signed(rate: float) -> GradientTransformation:
    return GradientTransformation(lambda params: (), lambda updates, state, **_: (updates, rate))


CASES: list[tuple[Any, str]] = [
    (torchopt.sgd(0.1), "sgd(lr=0.1)"),
    (torchopt.sgd(1), "sgd(lr=1)"),
    (torchopt.sgd(0.1, momentum=0.9), "sgd(lr=0.1, momentum=0.9)"),
    (torchopt.sgd(0.1, momentum=0.9, dampening=0.2), "sgd(lr=0.1, momentum=0.9, dampening=0.2)"),
    (torchopt.sgd(0.1, momentum=0.9, nesterov=True), "sgd(lr=0.1, momentum=0.9, nesterov=True)"),
    (torchopt.sgd(0.1, weight_decay=0.01), "sgd(lr=0.1, weight_decay=0.01)"),
    (torchopt.sgd(0.1, maximize=True), "sgd(lr=0.1, maximize=True)"),
    (torchopt.sgd(0.1, weight_decay=0.5, maximize=True), "sgd(lr=0.1, weight_decay=0.5, maximize=True)"),
    (torchopt.adam(1e-3), "adam(lr=0.001)"),
    (torchopt.adam(1e-5, use_accelerated_op=True), "adam(lr=1e-05)"),
    (torchopt.adam(1e-3, betas=(0.5, 0.999)), "adam(lr=0.001, betas=(0.5, 0.999))"),
    (torchopt.adam(1e-3, eps=1e-4, weight_decay=0.1), "adam(lr=0.001, weight_decay=0.1, eps=0.0001)"),
    (torchopt.adamw(1e-3), "adamw(lr=0.001, weight_decay=0.01)"),
    (torchopt.adamw(1e-3, weight_decay=0.3, mask=lambda _: [True]), "adamw(lr=0.001, weight_decay=0.3)"),
    (torchopt.rmsprop(0.01), "rmsprop(lr=0.01)"),
    (torchopt.rmsprop(0.01, alpha=0.9, centered=True), "rmsprop(lr=0.01, alpha=0.9, centered=True)"),
    (torchopt.adagrad(0.01), "adagrad(lr=0.01)"),
    (torchopt.adagrad(0.01, lr_decay=0.1), "adagrad(lr=0.01, lr_decay=0.1)"),
    (torchopt.adagrad(DECAY), "adagrad(lr=schedule)"),
    (torchopt.adadelta(0.01), "adadelta(lr=0.01)"),
    (torchopt.adadelta(0.01, rho=0.5), "adadelta(lr=0.01, rho=0.5)"),
    (torchopt.radam(0.01), "radam(lr=0.01)"),
    (torchopt.adamax(0.01, betas=(0.9, 0.99)), "adamax(lr=0.01, betas=(0.9, 0.99))"),
    (torchopt.sgd(DECAY), "sgd(lr=schedule)"),
    (torchopt.sgd(torch.tensor(0.1, requires_grad=True)), "sgd(lr=learned)"),
    (torchopt.sgd(torch.tensor(0.25)), "sgd(lr=0.25)"),
    (torchopt.clip_grad_norm(1.0, norm_type=1.0), "clip_grad_norm(1, norm_type=1)"),
    (torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.sgd(0.1)), "clip_grad_norm(0.3) → sgd(lr=0.1)"),
    (torchopt.chain(torchopt.nan_to_num(0.0), torchopt.adam(1e-3)), "nan_to_num → adam(lr=0.001)"),
    (torchopt.chain(torchopt.transform.scale_by_adam(), torchopt.transform.scale(-0.1)), "scale_by_adam → scale(-0.1)"),
    (torchopt.chain(), "identity"),
    (torchopt.combine.chain_flat(torchopt.nan_to_num(0.0), torchopt.transform.scale(0.5)), "nan_to_num → scale(0.5)"),
    (
        torchopt.combine.chain_flat(torchopt.transform.scale(-0.1), torchopt.transform.scale(-0.5)),
        "scale(-0.1) → scale(-0.5)",
    ),
    ((lambda: GradientTransformation(lambda p: (), lambda g, s: (g, s)))(), "custom"),
    (lambda rates: torchopt.sgd(rates["lr"]), "optimizer of rates"),
    (lambda rate, decay, fixed=0.9: torchopt.sgd(rate, fixed, weight_decay=decay), "optimizer of rate, decay"),
    (functools.partial(lambda rate, momentum: torchopt.sgd(rate, momentum), momentum=0.9), "optimizer of rate"),
    (signed(0.1), "signed"),
    (Mine(), "Mine"),
    (Mine, "Mine"),
    (Breaks(), "custom"),
    (GradientTransformation(len, len), "custom"),
    (lambda: torchopt.sgd(0.1), "custom"),
    (None, "NoneType"),
]


@pytest.mark.parametrize(("optimizer", "text"), CASES, ids=[text for _, text in CASES])
def test_an_optimizer_is_described_as_one_would_write_it(optimizer: Any, text: str) -> None:
    assert describe(optimizer) == text


def test_a_description_changes_nothing() -> None:
    # torchopt's momentum remembers in a closure whether it was called.
    optimizer = torchopt.sgd(0.1, momentum=0.9, dampening=0.5)
    describe(optimizer)
    grads = {"w": torch.ones(1)}
    updates, _ = optimizer.update(grads, optimizer.init(grads), params=grads, inplace=False)
    assert updates["w"].item() == pytest.approx(-0.1)
