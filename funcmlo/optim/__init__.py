"""Optimizers that are pure and can be differentiated, also with respect to their hyperparameters.

`mend` takes any transformation that torchopt makes and returns one with the same `init`/`update` pair and the same numbers
that

- keeps clipping in the graph: torchopt takes the norm without gradient and through `float()`, so differentiating the inner
  steps through its `clip_grad_norm` gives a wrong hypergradient;
- has a derivative at zero second moments: d√v/dv is infinite at v = 0 and meets a zero there, which is NaN, for every dead
  ReLU unit and unused embedding row;
- can be mapped by vmap, from a state that all share and from one for each: torchopt adds what is mapped to a state in place,
  and keeps some counters as Python numbers;
- is pure: torchopt's momentum remembers in a closure whether it was called before;
- computes what depends on the step's number alone in double precision: torchopt's schedules and Adam's bias corrections are
  single precision.

The makers of torchopt's names, `sgd`, `adam`, …, are that from the start, and their hyperparameters may be numbers, tensors,
or trees of them over the parameters' tree; `lr` may also be a function of the step's number.
"""

from __future__ import annotations

from funcmlo.optim.adaptive_moments import adam, adamax, adamw, radam
from funcmlo.optim.clipping import clip_grad_norm
from funcmlo.optim.gradient_descent import adadelta, adagrad, rmsprop, sgd
from funcmlo.optim.mending import mend
from funcmlo.optim.schedules import per_step
from funcmlo.optim.transformation import apply

__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "apply",
    "clip_grad_norm",
    "mend",
    "per_step",
    "radam",
    "rmsprop",
    "sgd",
]
