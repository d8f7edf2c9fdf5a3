"""What a function does while it runs: the operations it calls, what it writes to, where it leaves the graph.

Two of torch's modes listen together. A function mode hears the operation as the user wrote it and knows the line; a
dispatch mode below autograd hears the kernels that it becomes, so that a kernel of an error message finds its user's name.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from funcmlo import _tree
from funcmlo._tree import Tree

_TORCH = str(Path(torch.__file__).parent)
_CUTS = re.compile(r"\.(numpy|item|tolist|__float__|__int__|round_?|floor|ceil|trunc|sign|argmax|argmin|long|int)$")
_FRESH = re.compile(r"_like$|\.new_|empty|zeros|ones")
_QUIET = re.compile(r"(?<!data\.)__get__$|^grad$|^_|\.(dim|size|numel|stride|is_floating_point|is_complex)$")


@dataclass
class Watch:
    """What was seen.

    Attributes:
        failed: the operation through which an error passed, as the user knows it.
        where: the user's line of it.
        kernels: (the user's name, line, kernel) by a kernel's bare name.
        cuts: operations that take a value out of the graph, or whose derivative is zero, with their lines.
        functions: custom autograd Functions in the graph, by name, and whether they are once-differentiable.
        generator: the operation that drew from a generator of its own.
        narrowed: (dtype, operation): a float64 tensor went in, and less came out.
        written: (what, operation) of tensors from outside that were written to.
    """

    failed: str | None = None
    where: str | None = None
    kernels: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    cuts: list[str] = field(default_factory=list)
    functions: dict[str, bool] = field(default_factory=dict)
    generator: str | None = None
    narrowed: tuple[torch.dtype, str] | None = None
    written: list[tuple[str, str]] = field(default_factory=list)
    _calls: list[tuple[str, str]] = field(default_factory=list)
    _made: set[int] = field(default_factory=set)
    _outside: dict[int, tuple[weakref.ref[Tensor], Tensor]] = field(default_factory=dict)
    _writers: dict[int, str] = field(default_factory=dict)
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def call(self) -> tuple[str, str]:
        """The operation that is being called, and its line."""
        return self._calls[-1] if self._calls else ("", "")

    def settle(self, parts: Mapping[str, Tree]) -> None:
        """Work out which tensors from outside were written to.

        Args:
            parts: what was handed to the function, by the name that messages call it; the rest it holds itself.
        """
        tensors = [(name, x) for name, tree in parts.items() for x in _tree.leaves(tree) if isinstance(x, Tensor)]
        names = {_address(x): name for name, x in tensors}
        for address, (ref, saved) in self._outside.items():
            x = ref()
            if x is None:  # made inside by what no mode hears, and gone
                continue
            self._kept.append((x, saved))
            if not _same(x, saved):
                what = names.get(address, f"a tensor or a module's buffer that the loss holds, of shape {tuple(x.shape)}")
                self.written.append((what, self._writers.get(address, "")))
        self._outside.clear()

    def restore(self) -> None:
        """Put back what the function writes to outside of itself."""
        with torch.no_grad():
            for x, saved in self._kept:
                if x.shape == saved.shape and not _same(x, saved):
                    x.copy_(saved)
        self._kept.clear()

    def walk(self, value: Tensor) -> None:
        """Look for custom autograd Functions in a value's graph."""
        waiting, seen = [value.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
            function = getattr(type(node), "_forward_cls", None)
            if function is not None:
                backward = getattr(function.backward, "__code__", None)
                # torch's decorator puts a function of its own file in the backward's place.
                self.functions[function.__name__] = backward is not None and backward.co_filename.startswith(_TORCH)


def watched(function: Callable[[], Any]) -> tuple[Watch, Any, Exception | None]:
    """Run a function and listen.

    Args:
        function: of no arguments.

    Returns:
        What was seen, and what the function returned or raised.
    """
    watch = Watch()
    try:
        with _Functions(watch), _Kernels(watch):
            return watch, function(), None
    except Exception as error:  # that is what is asked for
        return watch, None, error


class _Functions(TorchFunctionMode):
    """Hears operations as they were written."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch, kwargs = self.watch, kwargs or {}
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if name == "_set_grad_enabled":
            if args[0] is False:
                watch.cuts.append(f"torch.no_grad ({_line()})")
            return func(*args, **kwargs)
        if _QUIET.search(name):
            return func(*args, **kwargs)
        name = name.replace("torch.functional.", "torch.").replace("data.__get__", "data")
        watch._calls.append((name, _line()))
        if kwargs.get("generator") is not None:
            watch.generator = name
        tracked = torch.is_grad_enabled() and any(_tracked(x) for x in _tree.leaves((args, kwargs)))
        try:
            out = func(*args, **kwargs)
            if tracked and (_CUTS.search(name) or (not _FRESH.search(name) and _untracked(out))):
                watch.cuts.append(f"{name} ({watch.call[1]})")
            return out
        except Exception:
            if watch.failed is None:
                watch.failed, watch.where = watch.call
            raise
        finally:
            watch._calls.pop()


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hears the kernels below autograd."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch, kernel = self.watch, func._schema.name
        called, line = watch.call
        watch.kernels.setdefault(bare(kernel), (called, line, kernel))
        operands = [x for x in _tree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        if kernel.startswith("aten::lift"):
            watch._made |= {_address(x) for x in operands}
        writes = func._schema.is_mutable or "batch_norm" in kernel
        for x in operands:
            address = _address(x)
            if address and address not in watch._made:
                if address not in watch._outside:
                    watch._outside[address] = weakref.ref(x), x.detach().clone()
                if writes:
                    watch._writers[address] = f"{called} ({line})"
        out = func(*args, **(kwargs or {}))
        results = [x for x in _tree.leaves(out) if isinstance(x, Tensor)]
        watch._made |= {a for x in results if (a := _address(x)) not in watch._outside}
        if any(x.dtype == torch.float64 for x in operands):
            for x in results:
                narrow = x.is_floating_point() and x.dtype != torch.float64
                if narrow and (watch.narrowed is None or _coarser(x.dtype, watch.narrowed[0])):
                    watch.narrowed = x.dtype, f"{called} ({line})"
        return out


def bare(kernel: str) -> str:
    """Return what names of a kernel, of its backward and of its graph's node have in common."""
    name = re.sub(r"^aten::|\.\w+$", "", kernel)
    name = re.sub(r"Backward\d*$", "", name)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    name = re.sub(r"_(backward|forward)(?=_|$)|_double", "", name)
    return name.strip("_")


def _coarser(a: torch.dtype, b: torch.dtype) -> bool:
    return torch.finfo(a).eps > torch.finfo(b).eps


def _tracked(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _untracked(out: Any) -> bool:
    """Whether what could have a derivative came out without one."""
    return isinstance(out, Tensor) and out.is_floating_point() and not out.requires_grad


def _line() -> str:
    """The innermost line that is neither torch's nor this package's."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, str(Path(__file__).parent))):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _address(x: Tensor) -> int:
    try:
        return x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no storage: sparse, or of another library
        return 0


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree, NaN being equal to NaN."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())
