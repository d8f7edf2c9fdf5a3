"""What `Stateless` needs to know of modules: where tensors are, empty copies, norms that write nothing, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

from funcmlo import _tree
from funcmlo.errors import DefinitionError, ParameterError


@dataclass(frozen=True)
class Place:
    """A tensor of a module: where it is kept, and every path under which a forward sees it.

    Args:
        owner: the submodule that keeps it.
        key: its name there.
        paths: its dotted names, the first of them the one it is known by; more than one where it is tied.
        parameter: whether it is a parameter, a buffer otherwise.
    """

    owner: nn.Module
    key: str
    paths: tuple[str, ...]
    parameter: bool

    def read(self) -> Tensor:
        """Return the tensor that is there now.

        Returns:
            The very tensor, not a copy.

        Raises:
            ParameterError: it has been taken away since.
        """
        kept = self.owner._parameters if self.parameter else self.owner._buffers
        x = kept.get(self.key)
        if x is None:
            raise ParameterError(
                f"'{self.paths[0]}' is no longer a {'parameter' if self.parameter else 'buffer'} of the module; make "
                "fm.Stateless(module) when the module is complete."
            )
        return x


def places(module: nn.Module, *, parameters: bool) -> dict[str, Place]:
    """Find a module's parameters or its buffers, each once, by their first names.

    Args:
        module: any module.
        parameters: whether parameters are asked for, buffers otherwise.

    Returns:
        The places by name, in the order of `named_parameters()` or `named_buffers()`.
    """
    found: dict[int, Place] = {}
    # A submodule that is shared is met once, so each path is a slot of its own and can be written to once.
    for prefix, part in module.named_modules():
        for key, x in (part._parameters if parameters else part._buffers).items():
            if x is None:
                continue
            path = f"{prefix}.{key}" if prefix else key
            first = found.get(id(x))
            found[id(x)] = (
                Place(part, key, (path,), parameters)
                if first is None
                else Place(first.owner, first.key, (*first.paths, path), parameters)
            )
    return {place.paths[0]: place for place in found.values()}


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without the values of its parameters and buffers; ties stay.

    Args:
        module: any module.

    Returns:
        A copy whose tensors are empty (on the meta device), for `torch.func.functional_call` to fill.

    Raises:
        DefinitionError: the module cannot be copied.
    """
    empty: dict[int, Any] = {id(b): b.detach().to("meta") for b in module.buffers()}
    empty |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    try:
        copied = copy.deepcopy(module, memo=empty)
    except Exception as error:
        raise DefinitionError(
            f"{type(module).__name__} cannot be copied ({error}); Stateless needs a module that copy.deepcopy takes."
        ) from error
    for part in copied.modules():
        if isinstance(part, parametrizations._SpectralNorm):
            part._power_method = _power_method.__get__(part)  # type: ignore[method-assign]
        if isinstance(part, parametrizations._WeightNorm):
            part.forward = _normed.__get__(part)  # type: ignore[method-assign]
    return copied


def _normed(self: parametrizations._WeightNorm, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    """G v / ‖v‖: torch's fused kernel of it has wrong second derivatives on the CPU, and no forward mode."""
    normed: Tensor = weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, self.dim))
    return normed


def filled(empty: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Copy a skeleton and give its tensors values.

    Args:
        empty: the skeleton, left as it is.
        values: a tensor for every name of a parameter or buffer; they are not copied.

    Returns:
        A module of its own.
    """
    memo = {
        id(place.read()): values[name] for kind in (True, False) for name, place in places(empty, parameters=kind).items()
    }
    return copy.deepcopy(empty, memo=dict(memo))


def silent(empty: nn.Module) -> nn.Module:
    """Make norms in training mode take the batch's statistics, as they do, and keep no running ones.

    Nothing is written then, so that a call with constant buffers works under every torch.func transform.

    Args:
        empty: a skeleton, left as it is.

    Returns:
        The skeleton itself where it has no such norm, a changed copy otherwise.
    """
    if not any(map(_keeps_statistics, empty.modules())):
        return empty
    changed = copy.deepcopy(empty)
    for part in filter(_keeps_statistics, changed.modules()):
        part.track_running_stats = False  # type: ignore[assignment]
        if isinstance(part, _InstanceNorm):  # it writes them whatever it is told
            part._buffers["running_mean"] = part._buffers["running_var"] = None
    return changed


def _keeps_statistics(part: nn.Module) -> bool:
    return isinstance(part, (_BatchNorm, _InstanceNorm)) and part.training and bool(part.track_running_stats)


def only_read(place: Place) -> bool:
    """Say whether a buffer is known to be read only once norms are silent: those of torch's own norms."""
    return isinstance(place.owner, (_BatchNorm, _InstanceNorm)) and type(place.owner).__module__.startswith("torch.nn.")


def mapped(*trees: Any) -> Callable[[Tensor], Tensor]:
    """Return, inside vmap, what makes a floating-point tensor one of each lane's own, which lanes may then write to.

    Args:
        *trees: what is computed with; some of its tensors may differ from lane to lane.

    Returns:
        x ↦ x, to the bit, mapped wherever a tensor of the trees is mapped.
    """
    tensors = [x for x in _tree.leaves(trees) if isinstance(x, Tensor)]
    never = torch.zeros((), dtype=torch.bool)
    for x in tensors:
        never = never.to(x.device) | x.new_zeros((), dtype=torch.bool)

    def own(x: Tensor) -> Tensor:
        return torch.where(never.to(x.device), x, x) if x.is_floating_point() or x.is_complex() else x

    return own


def _power_method(self: Any, weight_mat: Tensor, n_power_iterations: int) -> None:
    """Torch's power iteration of spectral normalization, without `out=`, which vmap and forward mode refuse.

    u ← Wv / ‖Wv‖, v ← Wᵀu / ‖Wᵀu‖, constants of the derivative in every mode.
    """
    W = weight_mat.detach()
    with torch.no_grad():
        for _ in range(n_power_iterations):
            self._u = nn.functional.normalize(torch.mv(W, self._v), dim=0, eps=self.eps)
            self._v = nn.functional.normalize(torch.mv(W.H, self._u), dim=0, eps=self.eps)


def refuse(module: nn.Module) -> None:
    """Raise for modules that are no pure function of parameters and buffers.

    Args:
        module: what the user gave.

    Raises:
        DefinitionError: it is one; the message says why, and what to wrap.
    """
    if not isinstance(module, nn.Module):
        raise DefinitionError(
            f"Stateless takes an nn.Module, but {type(module).__name__} came; a plain function needs no wrapping."
        )
    name = type(module).__name__
    for path, part in module.named_modules():
        kind, where = type(part).__name__, f" ('{path}')" if path else ""
        if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise DefinitionError(f"{kind}{where} spreads a module over devices; wrap what it holds, its .module, instead.")
        if hasattr(part, "_orig_mod"):
            raise DefinitionError(f"{kind}{where} is a compiled module; wrap the original, its ._orig_mod, instead.")
        if isinstance(part, torch.jit.ScriptModule):
            raise DefinitionError(f"{kind}{where} is a TorchScript module; wrap the nn.Module that it was made from.")
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise DefinitionError(
                f"{name}: {kind}{where} with max_norm= writes to its weights when it is called; leave max_norm= out, and "
                "keep the weights in the ball by Level(project=…)."
            )
        for hook in part._forward_pre_hooks.values():
            if type(hook).__module__ in {"torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"}:
                raise DefinitionError(
                    f"{name}: {kind}{where} is normalized by a hook, which writes to the module; use "
                    f"torch.nn.utils.parametrizations.{type(hook).__module__.rpartition('.')[2]}."
                )
    for path, x in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(x):
            raise DefinitionError(f"{name}: '{path}' has no shape yet; call the module on a batch first.")
        if x.is_meta:
            raise DefinitionError(
                f"{name}: '{path}' is on the meta device, where tensors have no values; make the module on a real device, "
                "or call its to_empty(device=…) and set its parameters."
            )
