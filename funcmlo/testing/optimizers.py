"""The kinds of torchopt transformations that the library knows, as code."""

from __future__ import annotations

OPTIMIZERS = {
    "sgd": "torchopt.sgd({0})",
    "weight decay": "torchopt.sgd({0}, weight_decay=0.01)",
    "momentum": "torchopt.sgd({0}, momentum=0.9)",
    "nesterov": "torchopt.sgd({0}, momentum=0.9, nesterov=True, weight_decay=0.01)",
    "dampened": "torchopt.sgd({0}, momentum=0.9, dampening=0.3)",
    "scheduled": "torchopt.sgd(torchopt.schedule.linear_schedule({0}, 0.01, 4), momentum=0.5)",
    "adam": "torchopt.adam({0})",
    "adamw": "torchopt.adamw({0}, weight_decay=0.02)",
    "adamax": "torchopt.adamax({0})",
    "radam": "torchopt.radam({0})",
    "adadelta": "torchopt.adadelta({0})",
    "adagrad": "torchopt.adagrad({0})",
    "rmsprop": "torchopt.rmsprop({0})",
    "centered": "torchopt.rmsprop({0}, centered=True)",
    "clipped": "torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.sgd({0}, momentum=0.5))",
    "clipped adam": "torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.adam({0}))",
}
"""By name, the code of a transformation, `{0}` for its rate: `transformation(OPTIMIZERS["adam"].format(0.1))`."""
