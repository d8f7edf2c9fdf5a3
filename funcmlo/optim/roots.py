"""Running means of g and g², the bias in them, and a root that has a derivative at zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from funcmlo.optim.transformation import cast, wide


def mean(m: Tensor, g: Tensor, beta: float | Tensor) -> Tensor:
    """Return β m + (1 − β) g, in m's dtype."""
    if isinstance(beta, Tensor):
        return cast(m * beta + (1 - beta) * g, m)
    return cast(torch.add(m * beta, g, alpha=1 - beta), m)


def mean_square(v: Tensor, g: Tensor, beta: float | Tensor) -> Tensor:
    """Return β v + (1 − β) g², in v's dtype."""
    if isinstance(beta, Tensor):
        return cast(v * beta + (1 - beta) * (g * g), v)
    return cast(torch.addcmul(v * beta, g, g, value=1 - beta), v)


def root(v: Tensor) -> Tensor:
    """Return √v, whose derivative is 0 where v = 0.

    d√v/dv is infinite at v = 0 and meets dv/dg = 2g = 0 there, which is NaN for every dead unit and unused embedding row.
    The root is taken to be constant below the smallest normal number, which any ε beside it absorbs: the derivative of
    m / (√v + ε) along g → 0 with m ∝ g is that of m / ε.
    """
    # float16's smallest normal number, 6e-5, is no small second moment; its smallest number of all is 6e-8.
    if v.is_complex():  # a complex step is far smaller than any floor, and has no order
        return v.sqrt()
    floor = 2.0**-24 if v.dtype == torch.float16 else torch.finfo(v.dtype).tiny
    return v.clamp_min(floor).sqrt()


def plus(x: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return x + ε, which for the number 0 is x itself."""
    return x if not isinstance(epsilon, Tensor) and epsilon == 0 else x + epsilon


def corrections(betas: Iterable[float | Tensor], t: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the bias 1 − β^t that a running mean from zero has after t steps, for each leaf, in its dtype.

    Args:
        betas: β for each leaf.
        t: the number of steps.
        leaves: the running means.

    Returns:
        A divisor for each.
    """
    known: dict[object, Tensor] = {}
    found = []
    for beta, x in zip(betas, leaves, strict=False):
        key = (id(beta), x.dtype, x.device)  # leaves that share a number share its power
        if key not in known:
            bias = correction(beta, t, x.device)
            dtype = torch.promote_types(beta.dtype, x.dtype) if isinstance(beta, Tensor) else x.dtype
            known[key] = bias.to(dtype)
        found.append(known[key])
    return found


def correction(beta: float | Tensor, t: Tensor, device: torch.device) -> Tensor:
    """Return 1 − β^t in double precision: in single precision β₂ = 0.999 costs four digits by cancellation at first."""
    if isinstance(beta, Tensor):
        return 1 - beta.to(wide(device)) ** t.to(device)
    t = t.to(device, wide(device))
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)
