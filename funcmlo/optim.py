"""torchopt's functional optimizers, made safe to differentiate.

`mend` takes any transformation that torchopt makes and returns one with the same `init`/`update` pair and the same
numbers that

- keeps clipping in the graph: torchopt takes the norm without gradient and through `float()`, so differentiating
  the inner steps through its `clip_grad_norm` gives a wrong hypergradient;
- has a derivative at zero second moments: d√v/dv is infinite at v = 0 and meets a zero there, which is NaN, for every
  dead ReLU unit and unused embedding row. Where v is zero its root is taken to be constant, which is the limit of
  the update's derivative along g → 0 with m ∝ g;
- can be mapped by vmap from a state that all share: torchopt adds what is mapped to a state in place, which is refused
  where the state is not;
- is pure: torchopt's momentum remembers in a closure whether it was called before, so the same call gives another
  answer the second time, and a restored run drops its momentum once.

torchopt keeps the parts of an optimizer in closures; they are recognized by the function that made them (torchopt
0.7). A transformation from elsewhere is used as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchopt.base import ChainedGradientTransformation, GradientTransformation
from torchopt.combine import chain_flat
from torchopt.transform import masked
from torchopt.transform.utils import tree_map_flat

from funcmlo import _tree
from funcmlo._tree import Tree


def mend(optimizer: GradientTransformation) -> GradientTransformation:
    """Return the same optimizer, pure and differentiable.

    Args:
        optimizer: a torchopt transformation, or any pair with its `init(params)` and
            `update(updates, state, *, params, inplace)`; `params` and `inplace` may be missing.

    Returns:
        A transformation with the same updates, in the same state wherever torchopt's own state suffices.

    Example:
        >>> import torch, torchopt
        >>> optimizer = mend(torchopt.adam(0.1))
        >>> params = {"w": torch.zeros(2)}
        >>> updates, state = optimizer.update({"w": torch.tensor([1.0, -1.0])}, optimizer.init(params), params=params)
        >>> updates["w"]
        tensor([-0.1000,  0.1000])

    References:
        https://torchopt.readthedocs.io/en/latest/optimizer/optim.html
    """
    mended = _mend(optimizer)
    taken = inspect.signature(mended.update).parameters
    # torchopt's default is in place, and passes down a chain; a pair from elsewhere may know neither word.
    fixed = {"inplace": False} if "inplace" in taken else {}

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        known = {"params": params, **fixed} if "params" in taken else fixed
        updates, state = mended.update(updates, state, **known)
        return updates, state

    return GradientTransformation(mended.init, update)


def apply(params: Tree, updates: Tree) -> Tree:
    """Return params + updates, each leaf in its own dtype."""
    return _tree.map(lambda p, u: p + u.to(p.dtype), params, updates)


# The makers, in torchopt 0.7, of the other updates that divide by a root of a second moment, or keep moments in place.
_ROOTED = {
    "_scale_by_adadelta",
    "_scale_by_adamax",
    "_scale_by_radam",
    "_scale_by_rms",
    "_scale_by_rss",
    "_scale_by_stddev",
}


def _mend(optimizer: GradientTransformation) -> GradientTransformation:
    """Mend one part, or the parts of a chain."""
    if isinstance(optimizer, ChainedGradientTransformation):
        return torchopt.chain(*(_mend(part) for part in optimizer.transformations))
    maker = getattr(optimizer.update, "__qualname__", "").partition(".<locals>")[0]
    if getattr(optimizer.update, "__module__", "").partition(".")[0] != "torchopt":
        return optimizer
    if maker == "chain_flat":
        return chain_flat(_mend(_closure(optimizer)["inner"]))
    if maker == "_masked":
        part = _closure(optimizer)
        flat = part["tree_map"] is tree_map_flat
        return masked.impl(_mend(part["inner"]), part["mask"], already_flattened=flat)
    if maker == "clip_grad_norm":
        return _clip_grad_norm(**_chosen(optimizer, "max_norm", "norm_type", "error_if_nonfinite"))
    if maker == "_trace":
        return _trace(optimizer, **_chosen(optimizer, "momentum", "dampening", "nesterov"))
    if maker == "_scale_by_adam":
        return _scale_by_adam(optimizer, **_chosen(optimizer, "b1", "b2", "eps", "eps_root"))
    if maker in _ROOTED:
        return GradientTransformation(optimizer.init, _with_safe_roots(optimizer.update))
    return optimizer


def _closure(optimizer: GradientTransformation) -> dict[str, Any]:
    """The values that an optimizer's update function closes over."""
    return dict(inspect.getclosurevars(optimizer.update).nonlocals)


def _chosen(optimizer: GradientTransformation, *names: str) -> dict[str, Any]:
    closure = _closure(optimizer)
    # A closure holds only what its function uses: torchopt's Nesterov branch has no dampening, for example.
    return {name: closure[name] for name in names if name in closure}


def _clip_grad_norm(max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> GradientTransformation:
    """Scale g by min(1, c / (‖g‖_p + 10⁻⁶)), with the norm in the graph."""

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        leaves = [g for g in _tree.leaves(updates) if g.numel()]
        if not leaves:
            return updates, state
        norms = [_norm(g, norm_type).to(leaves[0].device, _tree.precision(updates)) for g in leaves]
        total = _norm(torch.stack(norms), norm_type)
        if error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(f"the gradients' norm of order {norm_type} is {float(total)}, so it cannot be clipped")
        return _tree.scale((max_norm / (total + 1e-6)).clamp(max=1.0), updates), state

    return GradientTransformation(lambda params: torchopt.base.EmptyState(), update)


def _norm(x: Tensor, order: float) -> Tensor:
    """‖x‖_p whose gradient at x = 0 is 0, its subgradient of least norm."""
    zero = (x == 0).all()
    norm = torch.linalg.vector_norm(torch.where(zero, torch.ones_like(x), x), order)
    return torch.where(zero, torch.zeros_like(norm), norm)


class _TraceState(NamedTuple):
    """A momentum buffer, and whether it has seen a gradient."""

    trace: Tree
    started: Tensor


def _trace(
    optimizer: GradientTransformation, momentum: float, dampening: float = 0.0, nesterov: bool = False
) -> GradientTransformation:
    """m_{t+1} = μ m_t + (1 − τ) g_t, and m_1 = g_0 in full, as torch.optim.SGD starts it."""

    def init(params: Tree) -> _TraceState:
        first = next(iter(_tree.leaves(params)), torch.zeros(()))
        return _TraceState(optimizer.init(params).trace, torch.zeros((), dtype=torch.bool, device=first.device))

    def update(updates: Tree, state: _TraceState, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        fresh = _tree.where(state.started, _tree.scale(1.0 - dampening, updates), updates) if dampening else updates
        trace = _tree.map(lambda m, g: m * momentum + g, state.trace, fresh)
        answer = _tree.map(lambda g, m: g + m * momentum, updates, trace) if nesterov else trace
        return answer, _TraceState(trace, torch.ones_like(state.started))

    return GradientTransformation(init, update)


def _scale_by_adam(
    optimizer: GradientTransformation, b1: float, b2: float, eps: float, eps_root: float
) -> GradientTransformation:
    """Adam's direction m̂ / (√(v̂ + ε_r) + ε)."""
    # Written out, because the mode below costs three times the update itself. torchopt takes the bias corrections
    # 1 − β^t in float32, where β₂ = 0.999 costs four digits by cancellation at the first steps; see _correction.

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del params, inplace
        count = _tree.map(lambda c: c + 1, state.count)
        mu = _tree.map(lambda m, g: m * b1 + (1 - b1) * g, state.mu, updates)
        nu = _tree.map(lambda v, g: v * b2 + (1 - b2) * (g * g), state.nu, updates)

        def step(m: Tensor, v: Tensor, t: Tensor) -> Tensor:
            t = t.to(_tree.precision(v))
            m_hat, v_hat = m / _correction(b1, t).to(m.dtype), v / _correction(b2, t).to(v.dtype)
            return m_hat / (_root(v_hat + eps_root) + eps)

        return _tree.map(step, mu, nu, count), type(state)(mu=mu, nu=nu, count=count)

    return GradientTransformation(optimizer.init, update)


def _correction(beta: float | Tensor, t: Tensor) -> Tensor:
    """1 − β^t, without cancellation for a number β; a learned β stays in the graph."""
    if isinstance(beta, Tensor):
        return 1 - beta**t
    return -torch.expm1(t * math.log(beta)) if beta else torch.ones_like(t)


def _root(v: Tensor) -> Tensor:
    """√v whose derivative is 0 where v = 0."""
    zero = v == 0
    return torch.where(zero, v.detach(), torch.sqrt(torch.where(zero, torch.ones_like(v), v)))


# torchopt goes on with what these return, never with what they wrote to.
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    Tensor.add_: torch.add,
    Tensor.addcmul_: torch.addcmul,
    Tensor.div_: torch.div,
    Tensor.mul_: torch.mul,
}


class _SafeRoots(TorchFunctionMode):
    """While active, √v has derivative 0 where v = 0, and nothing is done in place; the values keep their bits."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.sqrt, Tensor.sqrt, Tensor.sqrt_):
            return _root(args[0])
        return _IN_PLACE.get(func, func)(*args, **(kwargs or {}))


def _with_safe_roots(update: Callable[..., Any]) -> Callable[..., Any]:
    def safe_update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        with _SafeRoots():
            updates, state = update(updates, state, params=params, inplace=False)
        return updates, state

    return safe_update
