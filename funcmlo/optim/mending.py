"""torchopt's functional optimizers, made safe to differentiate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torchopt.base import ChainedGradientTransformation, GradientTransformation, IdentityGradientTransformation
from torchopt.combine import chain_flat

from funcmlo import _tree
from funcmlo._tree import Tree
from funcmlo.errors import DefinitionError
from funcmlo.optim.clipping import clip_grad_norm
from funcmlo.optim.closures import closed_over, maker
from funcmlo.optim.decay import decay, masked
from funcmlo.optim.rates import scale, scale_by_schedule
from funcmlo.optim.scale_by_adadelta import scale_by_adadelta
from funcmlo.optim.scale_by_adam import scale_by_adam
from funcmlo.optim.scale_by_adamax import scale_by_adamax
from funcmlo.optim.scale_by_radam import scale_by_radam
from funcmlo.optim.scale_by_rms import scale_by_rms
from funcmlo.optim.scale_by_rss import scale_by_rss
from funcmlo.optim.schedules import exact
from funcmlo.optim.trace import trace
from funcmlo.optim.transformation import Mended, chain, stateless


def mend(optimizer: GradientTransformation) -> GradientTransformation:
    """Return the same optimizer, pure and differentiable.

    torchopt keeps the parts of an optimizer in closures; they are recognized by the function that made them (torchopt 0.7)
    and written out anew. A transformation from elsewhere is used as it is.

    Args:
        optimizer: a torchopt transformation, or any pair with its `init(params)` and
            `update(updates, state, *, params, inplace)`; `params` and `inplace` may be missing.

    Returns:
        A transformation with the same updates, to rounding. Its state holds tensors alone, so that vmap can map it.

    Raises:
        DefinitionError: `torchopt.register_hook`, which changes the tensors that it is given.

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
    if isinstance(optimizer, Mended):
        return optimizer
    if isinstance(optimizer, IdentityGradientTransformation):
        return chain()
    if isinstance(optimizer, ChainedGradientTransformation):
        return chain(*(mend(part) for part in optimizer.transformations))
    known = maker(optimizer.update)
    if known in _PARTS:
        return _PARTS[known](optimizer) or chain()
    return _from_elsewhere(optimizer)


def _from_elsewhere(optimizer: GradientTransformation) -> Mended:
    """A pair that is used as it is, but never in place."""
    taken = inspect.signature(optimizer.update).parameters

    def update(updates: Tree, state: Any, *, params: Tree = None, inplace: bool = False) -> tuple[Tree, Any]:
        del inplace
        # torchopt's default is in place, and passes down a chain; a pair from elsewhere may know neither word.
        known = {"params": params, "inplace": False}
        updates, state = optimizer.update(updates, state, **{name: x for name, x in known.items() if name in taken})
        return updates, state

    return Mended(optimizer.init, update)


def _flat(optimizer: GradientTransformation) -> GradientTransformation:
    """An optimizer of torchopt's, which works on a list of leaves; parts from elsewhere may need that, those here do not."""
    inner = closed_over(optimizer.update)["inner"]
    parts = getattr(inner, "transformations", (inner,))
    if all(isinstance(part, Mended) or maker(part.update) in _PARTS for part in parts):
        return mend(inner)
    return _from_elsewhere(chain_flat(mend(inner)))


def _masked(optimizer: GradientTransformation) -> GradientTransformation:
    known = closed_over(optimizer.update)
    return masked(mend(known["inner"]), known["mask"])


def _decay(optimizer: GradientTransformation) -> GradientTransformation | None:
    # Two of torchopt's functions close over the same names; only one of them has code that turns the gradient around.
    code = getattr(optimizer.update, "__code__", None)
    turned = any("neg" in getattr(part, "co_names", ()) for part in getattr(code, "co_consts", ()))
    return decay(closed_over(optimizer.update).get("weight_decay", 0.0), maximize=turned)


def _schedule(optimizer: GradientTransformation) -> GradientTransformation:
    return scale_by_schedule(exact(closed_over(optimizer.update)["step_size_fn"]))


def _nan_to_num(optimizer: GradientTransformation) -> GradientTransformation:
    known = closed_over(optimizer.update)
    return stateless(lambda updates, params: _tree.map(lambda g: g.nan_to_num(**known), updates))


def _no_hooks(optimizer: GradientTransformation) -> GradientTransformation:
    raise DefinitionError(
        "torchopt.register_hook changes the gradients that it is given, so it has no meaning in a pure optimizer; change "
        "the update by a transformation, such as torchopt.nan_to_num(0.0)."
    )


def _anew(function: Callable[..., Any], *names: str, **fixed: Any) -> Callable[[GradientTransformation], Any]:
    """A part made anew by a function of the settings that torchopt's closures hold."""

    def part(optimizer: GradientTransformation) -> Any:
        known = closed_over(optimizer.init, optimizer.update)
        # A closure holds only what its function uses: torchopt's Nesterov branch has no dampening, for example.
        return function(**{name: known[name] for name in names if name in known}, **fixed)

    return part


# By torchopt's maker of a part.
_PARTS: dict[str, Callable[[GradientTransformation], GradientTransformation | None]] = {
    "_add_decayed_weights": _decay,
    "_flip_sign_and_add_weight_decay": _decay,
    "_masked": _masked,
    "_scale": lambda optimizer: scale(closed_over(optimizer.update)["step_size"]),
    "_scale_by_accelerated_adam": _anew(scale_by_adam, "b1", "b2", "eps", "eps_root"),
    "_scale_by_adadelta": _anew(scale_by_adadelta, "rho", "eps"),
    "_scale_by_adam": _anew(scale_by_adam, "b1", "b2", "eps", "eps_root"),
    "_scale_by_adamax": _anew(scale_by_adamax, "b1", "b2", "eps"),
    "_scale_by_radam": _anew(scale_by_radam, "b1", "b2", "eps"),
    "_scale_by_rms": _anew(scale_by_rms, "alpha", "eps", "initial_scale"),
    "_scale_by_rss": _anew(scale_by_rss, "eps", "initial_accumulator_value"),
    "_scale_by_schedule": _schedule,
    "_scale_by_stddev": _anew(scale_by_rms, "alpha", "eps", "initial_scale", centered=True),
    "_trace": _anew(trace, "momentum", "dampening", "nesterov"),
    "chain_flat": _flat,
    "clip_grad_norm": _anew(clip_grad_norm, "max_norm", "norm_type", "error_if_nonfinite"),
    "nan_to_num": _nan_to_num,
    "register_hook": _no_hooks,
}
