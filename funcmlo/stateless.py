"""`Stateless`: an nn.Module as a pure function of its parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from funcmlo.errors import DefinitionError, ParameterError, listing, suggest


class Stateless:
    """An `nn.Module` as a pure function: `net(params, *inputs)`.

    The module is never changed. Its structure and mode are those at construction; `params()` reads its values when
    called, and a level trains all of them, whatever their `requires_grad`. A forward that counts its own calls or caches
    in attributes is no function of its inputs, and stays none.

    Args:
        module: a module without buffers, without active dropout and without tied parameters; these are refused.

    Raises:
        DefinitionError: the module cannot be turned into a pure function yet; the message says why.

    Example:
        >>> import torch
        >>> net = Stateless(torch.nn.Linear(3, 1))
        >>> sorted(net.params())
        ['bias', 'weight']
        >>> net(net.params(), torch.ones(5, 3)).shape
        torch.Size([5, 1])

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.func.functional_call.html
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise DefinitionError(
                f"Stateless takes an nn.Module, but {type(module).__name__} came; a plain function needs no wrapping."
            )
        _refuse(module)
        self._module = module
        # The skeleton shares no parameter with the module: functional_call swaps tensors in and out of it.
        swapped = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
        try:
            self._skeleton = copy.deepcopy(module, memo=dict(swapped))
        except Exception as error:
            raise DefinitionError(
                f"{type(module).__name__} cannot be copied ({error}); Stateless needs a module that copy.deepcopy takes."
            ) from error
        self._shapes = {name: p.shape for name, p in module.named_parameters()}

    def params(self) -> dict[str, Tensor]:
        """Return copies of the module's parameters by name, as they are now, cut from any graph."""
        return {name: p.detach().clone() for name, p in self._module.named_parameters()}

    def __call__(self, params: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Call the module's forward with these parameters.

        Args:
            params: a tensor for every name in `params()`.
            *args: positional inputs of the module.
            **kwargs: keyword inputs of the module.

        Returns:
            What the module's forward returns.

        Raises:
            ParameterError: a name is missing, unknown, or of another shape.
        """
        self._check(params)
        return torch.func.functional_call(self._skeleton, params, args, kwargs)

    def module(self, params: dict[str, Tensor]) -> nn.Module:
        """Return a module of its own that holds copies of these parameters, for what needs modules: hooks, factors.

        Args:
            params: a tensor for every name in `params()`.

        Returns:
            A new module, cut from any graph, whose parameters require gradients.

        Raises:
            ParameterError: a name is missing, unknown, or of another shape.
        """
        self._check(params)
        held = {id(p): nn.Parameter(params[name].detach().clone()) for name, p in self._skeleton.named_parameters()}
        return copy.deepcopy(self._skeleton, memo=dict(held))

    def _check(self, params: dict[str, Tensor]) -> None:
        name = type(self._module).__name__
        if not isinstance(params, dict):
            raise ParameterError(
                f"Stateless({name}) takes a dict of parameters first, but {type(params).__name__} came; call net(params, x)."
            )
        if params.keys() == self._shapes.keys():
            for key, shape in self._shapes.items():
                if params[key].shape != shape:
                    raise ParameterError(
                        f"Stateless({name}): parameter '{key}' has shape {tuple(params[key].shape)}, expected "
                        f"{tuple(shape)}; net.params() has them all."
                    )
            return
        for missing in self._shapes:
            if missing not in params:
                raise ParameterError(f"Stateless({name}): parameter '{missing}' is missing; {listing(params)} came.")
        for unknown in params:
            if unknown not in self._shapes:
                hint = suggest(unknown, self._shapes)
                raise ParameterError(f"Stateless({name}) has no parameter '{unknown}'{hint} It has {listing(self._shapes)}.")

    def __repr__(self) -> str:
        """Name the module and count its parameters."""
        count = sum(p.numel() for p in self._module.parameters())
        return f"Stateless({type(self._module).__name__}, {count:,} parameters)"


def _refuse(module: nn.Module) -> None:
    """Raise for what a pure function of the parameters alone cannot express yet."""
    name = type(module).__name__
    buffers = [n for n, _ in module.named_buffers()]
    if buffers:
        raise DefinitionError(
            f"{name} has buffers ({listing(buffers)}), which Stateless does not carry yet; use a module without them "
            "(GroupNorm or LayerNorm in place of BatchNorm, constants as plain attributes)."
        )
    for path, part in module.named_modules():
        rate = (
            getattr(part, "p", None) if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", None)
        )
        if part.training and isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0:
            raise DefinitionError(
                f"{name} has active dropout ({path or name}, p={rate}), which Stateless does not carry yet; call "
                "module.eval() first, or set its probability to 0."
            )
    names: dict[int, str] = {}
    for n, p in module.named_parameters(remove_duplicate=False):
        if id(p) in names:
            raise DefinitionError(
                f"{name} ties '{n}' to '{names[id(p)]}', which Stateless does not carry yet; give each its own tensor."
            )
        names[id(p)] = n
