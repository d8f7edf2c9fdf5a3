"""What the costs are made of, in JAX; the same names as in `torch_operations`."""

from __future__ import annotations

import importlib
from typing import Any

jax = importlib.import_module("jax")
jnp = jax.numpy

exp, sigmoid, relu = jnp.exp, jax.nn.sigmoid, jax.nn.relu


def softmax(x: Any, axis: int) -> Any:
    """Normalize exponentials along an axis."""
    return jax.nn.softmax(x, axis=axis)


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """Return x Wᵀ + b."""
    return x @ weight.T + bias


def gelu(x: Any) -> Any:
    """Return the exact GELU."""
    return jax.nn.gelu(x, approximate=False)


def binary_cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean over examples."""
    return (jax.nn.softplus(logits) - labels * logits).mean()


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return one number for each example; classes come last."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def convolution(x: Any, weight: Any, bias: Any) -> Any:
    """Return a 3×3 convolution that keeps height and width, as a product with all patches.

    XLA's own convolutions are 13 times slower inside of loops than outside on a CPU (0.10.2), and slow to differentiate
    twice.
    """
    (_, channels, height, width), outer = x.shape, len(weight)
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = jnp.stack([padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)], 2)
    return jnp.einsum("nckhw,ock->nohw", patches, weight.reshape(outer, channels, 9)) + bias[:, None, None]


def pool(x: Any) -> Any:
    """Return the largest of each 2×2."""
    n, channels, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, channels, height // 2, 2, width // 2, 2).max(axis=(3, 5))


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """Normalize the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def rows(table: Any, indices: Any) -> Any:
    """Return the table's rows at the indices."""
    return table[indices]


def where(condition: Any, x: Any, otherwise: float) -> Any:
    """Return x where the condition holds, and a number elsewhere."""
    return jnp.where(condition, x, otherwise)
