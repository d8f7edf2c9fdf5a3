"""JAX, for information: the inner loop and the solve in one compiled function, compiled before the clock starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paper_repro.hypercleaning.problem import Cleaning
from paper_repro.peers_accuracy.contenders import Answer, Knobs
from paper_repro.peers_accuracy.course import Settings

jax = importlib.import_module("jax")
jnp = importlib.import_module("jax.numpy")


def cg(problem: Cleaning, settings: Settings, knobs: Knobs) -> Answer:
    """Return by-hand's method under jit."""
    inputs, given = jnp.asarray(problem.x.numpy()), jnp.asarray(problem.given.numpy())
    inputs_valid, labels_valid = jnp.asarray(problem.x_valid.numpy()), jnp.asarray(problem.y_valid.numpy())

    def losses(y: Any, at: Any, labels: Any) -> Any:
        scores = jax.nn.log_softmax(at @ y["weight"] + y["bias"])
        return -jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]

    def lower(y: Any, x: Any) -> Any:
        squared = (y["weight"] ** 2).sum() + (y["bias"] ** 2).sum()
        return (jax.nn.sigmoid(x) * losses(y, inputs, given)).mean() + problem.decay * squared

    def upper(y: Any) -> Any:
        return losses(y, inputs_valid, labels_valid).mean()

    slope = jax.grad(lower)

    def outer_step(y: Any, speed: Any, x: Any, steps: Any) -> Any:
        def descend(_: Any, at: Any) -> Any:
            y, speed = at
            speed = jax.tree.map(lambda v, g: settings.momentum * v + g, speed, slope(y, x))
            return jax.tree.map(lambda p, v: p - settings.lower_lr * v, y, speed), speed

        y, speed = jax.lax.fori_loop(0, steps, descend, (y, speed))
        _, product = jax.linearize(lambda at: slope(at, x), y)
        w, _ = jax.scipy.sparse.linalg.cg(product, jax.grad(upper)(y), tol=0.0, maxiter=int(knobs.linear))
        (cross,) = jax.vjp(lambda x: slope(y, x), x)[1](w)
        return y, speed, -cross

    compiled = jax.jit(outer_step)
    y = {name: jnp.asarray(p.numpy()) for name, p in problem.classifier().items()}
    speed = jax.tree.map(jnp.zeros_like, y)
    jax.block_until_ready(compiled(y, speed, jnp.zeros(len(problem.x)), 1))

    def answer(x: Tensor, steps: int) -> Tensor:
        nonlocal y, speed
        y, speed, found = compiled(y, speed, jnp.asarray(x.numpy()), steps)
        return torch.from_numpy(jax.device_get(found).copy())

    return answer


METHODS: dict[str, Callable[[Cleaning, Settings, Knobs], Answer]] = {"jax-jit": cg}
