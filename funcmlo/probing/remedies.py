"""What went wrong with a loss, in the user's words, and the way around it."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from funcmlo.errors import listing
from funcmlo.kernels import OPERATION, REVERSE, SECOND, WAYS, sentence
from funcmlo.probing.watching import Watch, bare

LOOP = "call it in a loop in place of torch.func.vmap"
OUTSIDE = "use it outside of torch.func's transforms, where plain autograd does"

_WAYS: dict[str, str] = {"second": SECOND, "forward": REVERSE, "map": LOOP, "func": OUTSIDE}
"""What to do where nothing better is known, by the kind of question."""

_RULES: tuple[tuple[str, str], ...] = (
    *WAYS,
    (r"randomness", "torch.func.vmap(…, randomness='same'), or 'different'; under funcmlo's seeds both are reproducible"),
    (
        r"setup_context",
        "split its forward: forward(*inputs) without ctx, and a staticmethod setup_context(ctx, inputs, output)",
    ),
    (r"have vmap support", "set generate_vmap_rule = True in it, or write its vmap staticmethod"),
    (
        r"data-dependent control flow|\.item\(\) on a Tensor",
        "torch.where(condition, a, b) in place of if; keep numbers as tensors in place of .item()",
    ),
    (r"dynamic shape", "keep shapes fixed: torch.where(mask, x, 0) in place of x[mask]"),
    (
        r"(?i)batch.?norm.*(running|batched)",
        "keep no running statistics: track_running_stats=False, module.eval(), or another norm (GroupNorm, LayerNorm)",
    ),
    (
        r"(?i)in-?place",
        "make a new tensor: torch.where, torch.stack, torch.cat, x.index_put(…); x.clamp(0, 1) in place of x.clamp_(0, 1)",
    ),
    (
        r"requires_grad_\(\)|backward\(\) called|does not require grad",
        "inside a loss take derivatives by torch.func.grad, not by backward(), requires_grad_() or torch.autograd.grad",
    ),
    (
        r"(?i)numpy|data pointer|doesn't have storage",
        "compute with torch, or put the outside code in a torch.autograd.Function with its own derivative",
    ),
    (
        r"(?i)same dtype|dtype|Float but found|Double",
        "make constants in the parameters' dtype: x.to(params.dtype), torch.zeros_like(…)",
    ),
)


@dataclass(frozen=True)
class Fault:
    """What is wrong.

    Attributes:
        message: in a sentence.
        operation: the operation at fault, as far as it is known.
        remedy: the way around it.
    """

    message: str
    operation: str | None = None
    remedy: str | None = None


def fault_of(error: BaseException, kind: str, seen: Watch, tour: Watch) -> Fault:
    """Read an error.

    Args:
        error: what was raised.
        kind: the kind of question that raised it.
        seen: what was heard while it was raised.
        tour: what was heard when the loss was evaluated alone.

    Returns:
        The operation by its user's name, torch's message, and a remedy.
    """
    text = " ".join(str(error).split())
    operation, line = _operation(error, text, seen, tour)
    message = f"{type(error).__name__}: {sentence(text)}" + (f" ({line})" if line else "")
    return Fault(message, operation, remedy_for(f"{operation} {text}", kind))


def remedy_for(text: str, kind: str) -> str | None:
    """Return the way around, the special before the general."""
    special = next((way for pattern, way in _RULES if re.search(pattern, text)), None)
    general = _WAYS.get(kind)
    if special is None or general is None or general in special:
        return special or general
    return f"{special}; or {general}"


def silent(what: str, kind: str, tour: Watch) -> Fault:
    """Describe a derivative that is wrong without an error, with what may have cut it.

    Args:
        what: what was found.
        kind: the kind of question.
        tour: what was heard when the loss was evaluated alone.

    Returns:
        The fault; its operation lists the suspects, custom Functions first.
    """
    once = [name for name, is_once in tour.functions.items() if is_once]
    suspects = [f"{name} (once_differentiable)" for name in once]
    suspects += [f"{name} (torch.autograd.Function)" for name in tour.functions if name not in once]
    cuts = list(dict.fromkeys(tour.cuts))
    ways = []
    if tour.functions:
        ways.append("write the Function's backward with differentiable torch operations, without once_differentiable")
    if cuts:
        ways.append("let what depends on the parameters stay in the graph (no detach, .data, no_grad, numpy or item on it)")
    if kind in _WAYS:
        ways.append(_WAYS[kind])
    return Fault(what, listing([*suspects, *cuts]) if suspects or cuts else None, "; or ".join(ways) or None)


def _operation(error: BaseException, text: str, seen: Watch, tour: Watch) -> tuple[str | None, str | None]:
    """The operation at fault and its line."""
    if function := _custom(error, text, tour):
        return f"{function} (torch.autograd.Function)", None
    found = OPERATION.search(text)
    if found:
        kernel = next(name for name in found.groups() if name)
        known = next((w.kernels[bare(kernel)] for w in (seen, tour) if bare(kernel) in w.kernels), None)
        called = _public(kernel) or (known[0] if known else "")
        shown = kernel if kernel.endswith(("Backward", *"0123456789")) else f"aten::{kernel}"
        return (f"{called} ({shown})" if called else shown), known[1] if known else None
    return seen.failed, seen.where


def _public(kernel: str) -> str | None:
    """The name of what has its own, wherever it was called: attention also comes in layers."""
    return "torch.nn.functional.scaled_dot_product_attention" if "scaled_dot_product" in kernel else None


def _custom(error: BaseException, text: str, tour: Watch) -> str | None:
    """The custom autograd Function that an error is about."""
    if found := re.search(r"vmap over (\w+), but", text):
        return found[1]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        cls = frame.f_locals.get("cls")
        if frame.f_code.co_name == "apply" and "setup_context" in text and isinstance(cls, type):
            return cls.__name__
    return listing(tour.functions) if "autograd.Function" in text and tour.functions else None
