"""A short text for an optimizer, as one would write it: `clip_grad_norm(0.3) → sgd(lr=0.1, momentum=0.9)`.

torchopt keeps the parts of an optimizer in closures; they are recognized by the function that made them (torchopt
0.7), and the parts together say which of torchopt's optimizers it is. Settings at torchopt's defaults are left out.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torchopt.base import ChainedGradientTransformation, GradientTransformation, IdentityGradientTransformation

# By the maker of a part: the optimizer that the part makes of a chain, and the defaults of its settings.
_SCALES: dict[str, tuple[str, dict[str, Any]]] = {
    "_scale_by_adam": ("adam", {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}),
    "_scale_by_accelerated_adam": ("adam", {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}),
    "_scale_by_adamax": ("adamax", {"b1": 0.9, "b2": 0.999, "eps": 1e-6}),
    "_scale_by_radam": ("radam", {"b1": 0.9, "b2": 0.999, "eps": 1e-6}),
    "_scale_by_rms": ("rmsprop", {"alpha": 0.99, "eps": 1e-8}),
    "_scale_by_stddev": ("rmsprop", {"alpha": 0.99, "eps": 1e-8}),
    "_scale_by_rss": ("adagrad", {"eps": 1e-10}),
    "_scale_by_adadelta": ("adadelta", {"rho": 0.9, "eps": 1e-6}),
}
_TRACE = {"momentum": 0.0, "dampening": 0.0, "nesterov": False}
_DECAY = {"weight_decay": 0.0}


def describe(optimizer: Any) -> str:
    """Say in a few words what an optimizer is; for people, and as far as it can be seen.

    Args:
        optimizer: what a level was given: a torchopt transformation, a function of level names, or anything else.

    Returns:
        A line of text; the name of a class, or `custom`, where nothing better is known. Nothing is raised, whatever came.

    Example:
        >>> import torchopt
        >>> describe(torchopt.chain(torchopt.clip_grad_norm(0.3), torchopt.sgd(0.1, momentum=0.9)))
        'clip_grad_norm(0.3) → sgd(lr=0.1, momentum=0.9)'
        >>> describe(lambda rates: torchopt.sgd(rates["lr"]))
        'optimizer of rates'
    """
    try:
        return _describe(optimizer)
    except Exception:  # a text for people must not stop a program
        return "custom"


def _describe(optimizer: Any) -> str:
    if isinstance(optimizer, ChainedGradientTransformation):
        return " → ".join(_describe(part) for part in optimizer.transformations)
    if isinstance(optimizer, IdentityGradientTransformation):
        return "identity"
    if isinstance(optimizer, type):
        return optimizer.__name__
    if not callable(getattr(optimizer, "update", None)):
        return _function(optimizer) if callable(optimizer) else type(optimizer).__name__
    maker, closure = _made(optimizer)
    if maker == "chain_flat":
        inner = closure["inner"]
        return _whole(getattr(inner, "transformations", (inner,))) or _describe(inner)
    if maker == "clip_grad_norm":
        order = "" if closure["norm_type"] == 2 else f", norm_type={_value(closure['norm_type'])}"
        return f"clip_grad_norm({_value(closure['max_norm'])}{order})"
    if maker == "_scale":
        return f"scale({_value(closure['step_size'])})"
    return maker.strip("_") or ("custom" if type(optimizer) is GradientTransformation else type(optimizer).__name__)


def _function(factory: Any) -> str:
    """Describe a function of level names; an argument with a default is a constant, not a level."""
    arguments = inspect.signature(factory).parameters.values()
    read = [argument.name for argument in arguments if argument.default is argument.empty]
    return f"optimizer of {', '.join(read)}" if read else "custom"


def _made(optimizer: Any) -> tuple[str, dict[str, Any]]:
    """The name of the function that made a transformation, empty if there is none, and what its update closes over."""
    outer, inside, _ = getattr(optimizer.update, "__qualname__", "").rpartition(".<locals>.")
    if not inside:
        return "", {}
    maker = outer.rpartition(".<locals>.")[2]
    return maker.replace("<lambda>", ""), dict(inspect.getclosurevars(optimizer.update).nonlocals)


def _whole(parts: Sequence[Any]) -> str:
    """Describe the optimizer that parts make together; empty where they make none of torchopt's."""
    name, rate = "sgd", ""
    settings: dict[str, str] = {}
    for part in parts:
        maker, closure = _made(part)
        if maker == "_masked":
            maker, closure = _made(closure["inner"])
        if rate:  # the learning rate comes last
            return ""
        if maker in _SCALES:
            name, defaults = _SCALES[maker]
            settings |= _chosen(closure, defaults) | ({"centered": "True"} if maker == "_scale_by_stddev" else {})
        elif maker == "_trace":
            settings |= _chosen(closure, _TRACE)
        elif maker == "_flip_sign_and_add_weight_decay":
            settings |= _chosen(closure, _DECAY) | ({"maximize": "True"} if _turns_around(part) else {})
        elif maker == "_add_decayed_weights":
            name = "adamw"
            settings |= _chosen(closure, _DECAY)
        elif maker == "_scale_by_schedule" and "_adagrad" in closure["step_size_fn"].__qualname__:
            inner = inspect.getclosurevars(closure["step_size_fn"]).nonlocals
            settings |= _chosen({"lr_decay": inner["decay_rate"]}, {"lr_decay": 0.0})
        elif maker == "_scale_by_schedule":
            rate = "schedule"
        elif maker == "_scale":
            rate = _value(-closure["step_size"])
        else:
            return ""
    return f"{name}({', '.join(f'{key}={value}' for key, value in {'lr': rate, **settings}.items())})" if rate else ""


def _chosen(closure: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """The settings that differ from their defaults, as texts."""
    found = {key: closure[key] for key in defaults if key in closure}
    chosen = {key: _value(x) for key, x in found.items() if isinstance(x, Tensor) or x != defaults[key]}
    if "b1" in chosen or "b2" in chosen:
        betas = f"({_value(found['b1'])}, {_value(found['b2'])})"
        return {"betas": betas} | {key: text for key, text in chosen.items() if key not in {"b1", "b2"}}
    return chosen


def _turns_around(part: Any) -> bool:
    """Whether a part makes an ascent, which its closure does not tell: try it."""
    updates, _ = part.update([torch.ones(())], (), params=[torch.zeros(())], inplace=False)
    return bool(updates[0] < 0)


def compact(value: Any) -> str:
    """Write a frozen configuration as one would type it, its defaults left out.

    Args:
        value: a dataclass such as an estimator; anything else is written as it writes itself.

    Returns:
        The text.

    Example:
        >>> import funcmlo as fm
        >>> compact(fm.AID(fm.CG(20, damping=0.1)))
        'AID(CG(20, damping=0.1))'
    """
    if isinstance(value, GradientTransformation):
        return describe(value)
    if isinstance(value, FunctionType):
        return value.__name__
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    written: list[str] = []
    by_position = True
    for f in sorted(dataclasses.fields(value), key=lambda f: f.kw_only is True):
        if not f.init or not f.repr:
            continue
        x = getattr(value, f.name)
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        by_position = by_position and required and not f.kw_only and not written
        if required or (x is not f.default and x != f.default):
            written.append(compact(x) if by_position else f"{f.name}={compact(x)}")
    return f"{type(value).__name__}({', '.join(written)})"


def _value(x: Any) -> str:
    if isinstance(x, Tensor):
        if x.requires_grad:
            return "learned"
        return _value(x.item()) if x.numel() == 1 else f"tensor of {x.numel()}"
    return f"{x:.6g}" if isinstance(x, float) else str(x)
