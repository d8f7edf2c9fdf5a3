"""`probe`: what works of a loss before anything is built on it, and what to do about the rest."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcmlo import _forward, _random, _tracing, _tree, operands
from funcmlo._tree import Tree
from funcmlo.describe import compact
from funcmlo.errors import BatchError, EstimatorError, ParameterError, listing
from funcmlo.level import Level
from funcmlo.probing.case import Case
from funcmlo.probing.outcome import Outcome, Probe
from funcmlo.probing.questions import answers
from funcmlo.signature import BATCH, read_call


def probe(loss: Callable[..., Any] | Level, params: Tree, /, *inputs: Tree, batch: Any = None, **named: Tree) -> Probe:
    """Say which derivatives of a loss work, which operation stops the others, and the way around it.

    Each derivative is tried as it is used: the gradient, Hessian-vector products by reverse mode over reverse mode and by
    forward mode over reverse mode, under plain autograd and `torch.func`, and both under `torch.func.vmap` over
    the parameters and over the inputs. What raises no error is held against central differences, in float64 where the loss
    can, because a second derivative that is cut off somewhere comes back as zero. Losses that fail are reported, never
    raised.

    It costs some hundred gradients, and a copy of each tensor that the loss holds. Nothing that comes in is changed, nor
    what the loss closes over, nor the state of any default generator (torch's, Python's, numpy's).

    Args:
        loss: `loss(params, …)`, read as a `Level`'s; or a level, whose loss and `reads=` are taken.
        params: the loss's own parameters, a tree of floating-point tensors; the answers hold for their dtype and device.
        *inputs: the loss's other arguments, in its order.
        batch: what the loss's argument `batch` receives; a function from the step's number to a batch is asked for step 0.
        **named: the other arguments by name.

    Returns:
        The answers: `probe.failures` by name, `probe.estimators`, `probe.advice`; printed, a table.

    Raises:
        BatchError: a batch came that the loss does not take, or none where it takes one.
        DefinitionError: the loss's signature does not say what it reads.
        EstimatorError: it is called under a torch.func transform or in inference mode.
        ParameterError: an input is missing or unknown, or `params` is no tree of floating-point tensors.

    Example:
        >>> import torch, funcmlo as fm
        >>> found = fm.probe(lambda w, x: torch.cdist(w, x).sum(), torch.randn(3, 2), torch.randn(4, 2))
        >>> sorted(found.failures)
        ['func_grad_of_grad', 'grad_of_grad', 'jvp_of_grad']
        >>> found.grad_of_grad.operation
        'torch.cdist (aten::_cdist_backward)'
        >>> found.estimators["FiniteDifference()"], found.estimators["ITD()"]
        (True, False)

    References:
        Griewank and Walther 2008, Evaluating Derivatives; Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """
    level = loss if isinstance(loss, Level) else None
    function = level.loss if level is not None else loss
    if not callable(function):
        raise ParameterError(f"probe takes a loss first, a function of (params, …); {type(function).__name__} came.")
    call, _ = read_call(function, level.reads if level is not None else None, owner="probe: the loss", own=True)
    if _tracing.transforming() or torch.is_inference_mode_enabled():
        raise EstimatorError(
            "probe takes derivatives of its own; call it outside of torch.func's transforms and of torch.inference_mode."
        )
    _check_params(params)
    missing = [name for name in call.levels[len(inputs) :] if name not in named]
    if missing:
        raise ParameterError(
            f"probe: the inputs {listing(map(repr, missing))} did not come; expected probe(loss, params, "
            f"{listing(call.levels)}), by position or by name."
        )
    values = operands.named("probe", call.levels, inputs, named)
    if BATCH in call.sources and batch is None:
        raise BatchError("probe: the loss takes a batch, but none came; expected probe(loss, params, …, batch=…).")
    if BATCH not in call.sources and batch is not None:
        raise BatchError(
            "probe: a batch came, but the loss has no argument batch without a default; leave it out, or name the argument "
            "batch."
        )
    if callable(batch) and not isinstance(batch, (Tensor, Mapping)):
        batch = batch(0)
    with _left_alone() as heard, torch.enable_grad():
        _forward._load_forward_mode()
        outcomes = answers(Case(call, _tree.detach(params), _tree.detach(values), _tree.detach(batch)))
    said = tuple(dict.fromkeys(_shortened(warning) for warning in heard if _worth_saying(warning)))
    return Probe(level.name if level is not None else compact(function), outcomes, said)


def _check_params(params: Tree) -> None:
    leaves = _tree.named_leaves(params)
    if not leaves:
        raise ParameterError("probe: params holds no tensor; expected a tree of floating-point tensors.")
    for path, leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            came = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ParameterError(
                f"probe: params{path} is {came}; expected a tree of floating-point tensors"
                f"{'; of a module, net.params()' if isinstance(leaf, torch.nn.Module) else ''}."
            )


@contextmanager
def _left_alone() -> Generator[list[warnings.WarningMessage]]:
    """Catch warnings, and put back the generators that a loss may draw from."""
    numpy_random = getattr(sys.modules.get("numpy"), "random", None)
    python, numpy = random.getstate(), numpy_random.get_state() if numpy_random is not None else None
    try:
        with _random.seeded(0), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            yield heard
    finally:
        random.setstate(python)
        if numpy_random is not None:
            numpy_random.set_state(numpy)


def _worth_saying(warning: warnings.WarningMessage) -> bool:
    """Whether a warning is about the loss: not of torch's own parts, and not already an answer."""
    if issubclass(warning.category, (DeprecationWarning, FutureWarning)):
        return not warning.filename.startswith(str(torch.__path__[0]))
    return "performance drop" not in str(warning.message)


def _shortened(warning: warnings.WarningMessage) -> str:
    text = " ".join(str(warning.message).split()).split(" (Triggered internally")[0]
    return text if len(text) <= 160 else text[:160] + "…"


__all__ = ["Outcome", "Probe", "probe"]
