"""The workloads' mathematics, written once: `ops` is `torch_operations` or `jax_operations`.

Inner costs are functions of (ops, parameters y, hyperparameters x, data), outer ones of (ops, x, y, data); trees are dicts.
"""

from __future__ import annotations

import math
from typing import Any

HEADS = 4

Tree = dict[str, Any]


def decay(y: Tree, strength: float) -> Any:
    """Return λ‖y‖² / 2, which makes the curvature positive where products are taken."""
    return 0.5 * strength * sum((p * p).sum() for p in y.values())


# Networks


def mlp(ops: Any, y: Tree, inputs: Any) -> Any:
    """Return the outputs of three linear layers with ReLUs between."""
    hidden = ops.relu(ops.linear(inputs, y["w1"], y["b1"]))
    hidden = ops.relu(ops.linear(hidden, y["w2"], y["b2"]))
    return ops.linear(hidden, y["w3"], y["b3"])


def convnet(ops: Any, y: Tree, inputs: Any) -> Any:
    """Return the logits of a linear layer on convolutions, each with a ReLU and a pool of 2×2."""
    for layer in range(1, 1 + sum(name.startswith("w") for name in y)):
        inputs = ops.pool(ops.relu(ops.convolution(inputs, y[f"w{layer}"], y[f"b{layer}"])))
    return ops.linear(inputs.reshape(len(inputs), -1), y["head"], y["bias"])


def attention(ops: Any, y: Tree, layer: int, at: Any, causal: Any) -> Any:
    """Return causal attention by its formula, in matrix products."""
    size, length, width = at.shape

    def heads(name: str) -> Any:
        projected = ops.linear(at, y[f"{name}{layer}"], y[f"{name}{layer}_bias"])
        return projected.reshape(size, length, HEADS, width // HEADS).swapaxes(1, 2)

    scores = heads("query") @ heads("key").swapaxes(-1, -2) / math.sqrt(width // HEADS)
    mixed = ops.softmax(ops.where(causal, scores, -1e9), -1) @ heads("value")
    return ops.linear(mixed.swapaxes(1, 2).reshape(size, length, width), y[f"out{layer}"], y[f"out{layer}_bias"])


def transformer(ops: Any, y: Tree, tokens: Any, causal: Any) -> Any:
    """Return the logits of every next token: blocks that normalize first, and a tied head."""
    at = ops.rows(y["tokens"], tokens) + y["places"]
    for layer in range(1, 1 + sum(name.startswith("up") for name in y) // 2):
        at = at + attention(ops, y, layer, ops.layer_norm(at, y[f"scale{layer}a"], y[f"shift{layer}a"]), causal)
        normed = ops.layer_norm(at, y[f"scale{layer}b"], y[f"shift{layer}b"])
        hidden = ops.gelu(ops.linear(normed, y[f"up{layer}"], y[f"up{layer}_bias"]))
        at = at + ops.linear(hidden, y[f"down{layer}"], y[f"down{layer}_bias"])
    return ops.linear(at, y["tokens"], y["head_bias"])


# Costs


def logistic_inner(ops: Any, y: Tree, x: Tree, data: Tree) -> Any:
    """Return the training loss with a weight decay for each feature."""
    fit = ops.binary_cross_entropy(data["inputs"] @ y["weight"] + y["bias"], data["labels"])
    return fit + 0.5 * (ops.exp(x["log_decay"]) * y["weight"] ** 2).sum()


def logistic_outer(ops: Any, x: Tree, y: Tree, data: Tree) -> Any:
    """Return the validation loss."""
    return ops.binary_cross_entropy(data["valid_inputs"] @ y["weight"] + y["bias"], data["valid_labels"])


def mlp_inner(ops: Any, y: Tree, x: Tree, data: Tree) -> Any:
    """Return the training loss with a weight for each example."""
    losses = ops.cross_entropy(mlp(ops, y, data["inputs"]), data["labels"])
    return (ops.sigmoid(x["logits"]) * losses).mean() + decay(y, 0.15)


def mlp_outer(ops: Any, x: Tree, y: Tree, data: Tree) -> Any:
    """Return the validation loss."""
    return ops.cross_entropy(mlp(ops, y, data["valid_inputs"]), data["valid_labels"]).mean()


def convnet_inner(ops: Any, y: Tree, x: Tree, data: Tree) -> Any:
    """Return the training loss, each example weighted by a net of its loss (Meta-Weight-Net, its input not detached)."""
    losses = ops.cross_entropy(convnet(ops, y, data["inputs"]), data["labels"])
    hidden = ops.relu(ops.linear(losses[:, None], x["w1"], x["b1"]))
    weights = ops.sigmoid(ops.linear(hidden, x["w2"], x["b2"]))[:, 0]
    return (weights * losses).mean() + decay(y, 2.0)


def convnet_outer(ops: Any, x: Tree, y: Tree, data: Tree) -> Any:
    """Return the validation loss."""
    return ops.cross_entropy(convnet(ops, y, data["valid_inputs"]), data["valid_labels"]).mean()


def transformer_inner(ops: Any, y: Tree, x: Tree, data: Tree) -> Any:
    """Return the training loss with a weight for each sequence."""
    logits = transformer(ops, y, data["tokens"], data["causal"])
    losses = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), data["next"].reshape(-1))
    losses = losses.reshape(data["next"].shape).mean(-1)
    return (ops.sigmoid(x["logits"]) * losses).mean() + decay(y, 1.0)


def transformer_outer(ops: Any, x: Tree, y: Tree, data: Tree) -> Any:
    """Return the validation loss."""
    logits = transformer(ops, y, data["valid_tokens"], data["causal"])
    return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), data["valid_next"].reshape(-1)).mean()


# Tasks: the same cost on support and query examples, and no hyperparameter but the start


def maml_mlp(ops: Any, y: Tree, data: Tree) -> Any:
    """Return the squared error."""
    return ((mlp(ops, y, data["inputs"]) - data["targets"]) ** 2).mean()


def maml_convnet(ops: Any, y: Tree, data: Tree) -> Any:
    """Return the mean cross-entropy."""
    return ops.cross_entropy(convnet(ops, y, data["inputs"]), data["labels"]).mean()
