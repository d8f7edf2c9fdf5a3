"""Kernels without second derivatives: attention by its formula where one is taken; elsewhere an error with the way out."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from funcmlo.describe import compact
from funcmlo.errors import EstimatorError

SECOND = "take an estimator of gradients alone: FiniteDifference(), Penalty(), AID(…, Hessian('finite_difference'), …)"
REVERSE = "take reverse mode: ITD(), AID(…, Hessian('kept'), …); forward mode is not needed elsewhere"

WAYS: tuple[tuple[str, str], ...] = (
    (
        r"scaled_dot_product|(flash|efficient)_attention",
        "compute attention by its formula: `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):` "
        "around the loss",
    ),
    (r"(?i)cudnn.?rnn", "leave cuDNN: `with torch.backends.cudnn.flags(enabled=False):` around the loss"),
    (r"mkldnn_rnn", "leave oneDNN: `with torch.backends.mkldnn.flags(enabled=False):` around the loss"),
    (r"cdist|pdist", "write distances out: torch.linalg.vector_norm(x[:, None] - y[None], dim=-1)"),
    (r"embedding_bag", "write it out: torch.nn.functional.embedding(index, weight) and then .sum(1) or .mean(1)"),
    (r"implement the jvp function", "write its jvp staticmethod; or " + REVERSE),
    (r"once.differentiable", "write its backward with differentiable torch operations, without once_differentiable"),
)
"""What to do about an operation without a derivative: (what the error or the operation says, the way around)."""

OPERATION = re.compile(
    r"derivative for '?(?:aten::)?(\w+)|forward AD with (\w+)|over aten::(\w+)|Function '(\w+?Backward\d*)'"
)
"""Where an error of torch names the operation that it is about."""

_SECOND = re.compile(r"derivative for .* is not implemented|once.differentiable|(?i:double backward)")
# A custom Function that torch.func does not take at all names jvp too.
_FORWARD = re.compile(r"^(?!.*setup_context).*(forward (mode )?AD|\bjvp\b)")


class attention:  # ruff: ignore[invalid-class-name] - used as a function, on every evaluation of every cost
    """Run a block with attention computed by its formula, softmax(QKᵀ/√d) V, which has derivatives of every order.

    The fused kernels of `torch.nn.functional.scaled_dot_product_attention` have first ones alone, and no forward mode.
    It is torch's flags that are set, for the whole process, as `torch.nn.attention.sdpa_kernel` does in ten times as long.

    Args:
        formula: whether it is; else the block runs as it is.
    """

    __slots__ = ("_before", "_formula")

    def __init__(self, *, formula: bool) -> None:
        self._formula = formula

    def __enter__(self) -> None:
        """Choose the formula."""
        self._before = _chosen() if self._formula else _FORMULA
        if self._before != _FORMULA:
            _choose(*_FORMULA)

    def __exit__(self, *raised: object) -> None:
        """Choose what was chosen before."""
        if self._before != _FORMULA:
            _choose(*self._before)


_FORMULA = (False, False, False, True)


def _chosen() -> tuple[bool, ...]:
    """Which kernels of attention torch may choose: flash, memory-efficient, cuDNN's, the formula."""
    context = torch._C
    return (
        context._get_flash_sdp_enabled(),
        context._get_mem_efficient_sdp_enabled(),
        context._get_cudnn_sdp_enabled(),
        context._get_math_sdp_enabled(),
    )


def _choose(flash: bool, efficient: bool, cudnn: bool, formula: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.enable_math_sdp(formula)


@contextmanager
def naming(owner: str, response: Any) -> Generator[None]:
    """Run a block; where it asks an operation for a derivative that it has not, say whose it is and what to do.

    Args:
        owner: the level whose cost is differentiated, for the message.
        response: the estimator that differentiates it.

    Raises:
        EstimatorError: in place of torch's error, which is its cause.
        RuntimeError: torch's errors about anything else, as they are.
    """
    try:
        yield
    except (EstimatorError, NotImplementedError, RuntimeError) as error:
        # What forward mode lacks was said already, but not for whom.
        torch_error = error.__cause__ if isinstance(error, EstimatorError) else error
        text = "" if torch_error is None else " ".join(str(torch_error).split())
        forward = bool(_FORWARD.search(text))
        if not forward and not _SECOND.search(text):
            raise
        what = "forward-mode" if forward else "second"
        raise EstimatorError(
            f"{owner}: {compact(response)} takes {what} derivatives of its cost, and {_operation(text)} has none "
            f"(torch: {sentence(text)}). {_capital(remedy_for(text, REVERSE if forward else SECOND))}; "
            "fm.probe(loss, …) tells what else works."
        ) from torch_error


def remedy_for(text: str, general: str) -> str:
    """Return the way around an operation's missing derivative, the special before the general.

    Args:
        text: torch's error.
        general: what to do in any case.

    Returns:
        A clause.
    """
    special = next((way for pattern, way in WAYS if re.search(pattern, text)), None)
    return general if special is None else special if general in special else f"{special}; or {general}"


def sentence(text: str) -> str:
    """Return the first sentence of an error of torch, at most 200 characters of it."""
    first = re.split(r"(?<=[a-z])\. |; | Please | For more details", f"{text} ")[0].strip().rstrip(".")
    return first if len(first) <= 200 else first[:200] + "…"


def _operation(text: str) -> str:
    found = OPERATION.search(text)
    if not found:
        return "an operation in it"
    kernel = next(name for name in found.groups() if name)
    return kernel if kernel.endswith(("Backward", *"0123456789")) else f"aten::{kernel}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
