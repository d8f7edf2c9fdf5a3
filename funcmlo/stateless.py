"""`Stateless`: an nn.Module as a pure function of its parameters and buffers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funcmlo import _tracing
from funcmlo._attributes import Attributes
from funcmlo._modules import filled, mapped, only_read, places, refuse, silent, skeleton
from funcmlo._selection import Train, trained
from funcmlo.errors import DefinitionError, ParameterError, listing, suggest


class Stateless:
    """An `nn.Module` as a pure function: `net(params, *inputs)`, or `net(params, *inputs, buffers=b)` → (output, new b).

    The module is never changed: not its values, nor its buffers, gradients, mode and attributes. Structure and mode are
    those at construction; values are read when they are needed, so that they follow `module.to(…)`. Parameters that are
    not trained are constants, which live in the module alone. A tied parameter is held once, by its first name. Random
    numbers (dropout) come from torch's default generator.

    What a forward writes to attributes is undone after the call; one that changes an attribute that was not empty is no
    function of its inputs, and raises.

    Args:
        module: any module that `copy.deepcopy` takes, with values: initialized, and on a real device.
        train: which parameters are trained: a predicate on names, or a collection of names and patterns (``"*.lora_*"``).
            By default those with `requires_grad`.

    Attributes:
        training: the module's mode at construction.

    Raises:
        DefinitionError: the module is no pure function, or nothing is left to train; the message says why.

    Example:
        >>> import torch
        >>> net = Stateless(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)))
        >>> net
        Stateless(Sequential, 12 parameters, 3 buffers)
        >>> params, buffers, x = net.params(), net.buffers(), torch.arange(6.0).reshape(2, 3)
        >>> output = net(params, x)  # the batch's statistics; nothing is written
        >>> output, new = net(params, x, buffers=buffers)
        >>> int(buffers["1.num_batches_tracked"]), int(new["1.num_batches_tracked"])
        (0, 1)
        >>> output = net.eval()(params, x)  # the running statistics

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.func.functional_call.html
    """

    def __init__(self, module: nn.Module, train: Train = None) -> None:
        refuse(module)
        self._name = type(module).__name__
        parameters = places(module, parameters=True)
        chosen = trained(self._name, parameters, train)
        self._trained = {name: place for name, place in parameters.items() if name in chosen}
        self._frozen = {name: place for name, place in parameters.items() if name not in chosen}
        self._buffers = places(module, parameters=False)
        self._shapes = {name: place.read().shape for name, place in self._trained.items()}
        self._buffer_shapes = {name: place.read().shape for name, place in self._buffers.items()}
        self._ties = [(path, name) for name, place in self._trained.items() for path in place.paths[1:]]
        self._constants = [(place, path) for place in self._frozen.values() for path in place.paths]
        self._prepare(skeleton(module))

    def _prepare(self, empty: nn.Module) -> None:
        """Keep two skeletons, one that writes its buffers and one that takes them as constants where it can."""
        self.training, self._modes = empty.training, dict[bool, Stateless]()
        self._writing, self._silent = empty, silent(empty)
        self._writing_attributes, self._silent_attributes = Attributes(self._writing), Attributes(self._silent)
        slots = places(self._silent, parameters=False)
        self._constant_buffers = [
            (self._buffers[name], not only_read(place), place.owner.training, place.paths) for name, place in slots.items()
        ]
        written = places(self._writing, parameters=False)
        self._written_buffers = [(name, place.owner.training, place.paths) for name, place in written.items()]

    def params(self) -> dict[str, Tensor]:
        """Return copies of the parameters that are trained, by name, as they are now, cut from any graph."""
        return {name: place.read().detach().clone() for name, place in self._trained.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of all buffers, by name, as they are now, cut from any graph."""
        return {name: place.read().detach().clone() for name, place in self._buffers.items()}

    def __call__(
        self, params: dict[str, Tensor], /, *args: Any, buffers: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Call the module's forward with these parameters.

        Args:
            params: a tensor for every name in `params()`.
            *args: positional inputs of the module.
            buffers: a tensor for every name in `buffers()`. By default the module's own are constants: norms in training
                mode take the batch's statistics, and what the forward would write is lost.
            **kwargs: keyword inputs of the module.

        Returns:
            What the module's forward returns; with `buffers`, a pair of it and the new buffers, cut from any graph.

        Raises:
            ParameterError: a name is missing, unknown, or of another shape.
        """
        values = self._values(params)
        if buffers is None:
            part, attributes = self._silent, self._silent_attributes
            own = self._own((params, args, kwargs), any(c and t for _, c, t, _ in self._constant_buffers))
            for place, copied, training, paths in self._constant_buffers:
                # The copy is made here, inside the innermost transform, which may then write to it.
                x = place.read().clone() if copied else place.read()
                values.update(dict.fromkeys(paths, own(x) if copied and training else x))
        else:
            part, attributes = self._writing, self._writing_attributes
            self._check_buffers(buffers)
            own = self._own((params, args, kwargs), any(t for _, t, _ in self._written_buffers))
            for name, training, paths in self._written_buffers:
                x = buffers[name].clone()
                values.update(dict.fromkeys(paths, own(x) if training else x))
        done = False
        try:
            output = torch.func.functional_call(part, values, args, kwargs, tie_weights=False)
            done = True
        finally:
            attributes.restore(repr(self) if done else None)
        return output if buffers is None else (output, self._moved(buffers, values))

    def eval(self) -> Stateless:
        """Return the same function in evaluation mode; its parameters and buffers have the same names."""
        return self._in_mode(False)

    def train(self) -> Stateless:
        """Return the same function in training mode, all parts of it; its parameters and buffers have the same names."""
        return self._in_mode(True)

    def _in_mode(self, training: bool) -> Stateless:
        if training not in self._modes:
            if all(part.training == training for part in self._writing.modules()):
                return self
            other = self._modes[training] = copy.copy(self)
            other._prepare(copy.deepcopy(self._writing).train(training))
        return self._modes[training]

    def module(self, params: dict[str, Tensor], buffers: dict[str, Tensor] | None = None) -> nn.Module:
        """Return a module of its own that holds copies of these values, for what needs modules: hooks, factors.

        Args:
            params: a tensor for every name in `params()`.
            buffers: a tensor for every name in `buffers()`; the module's own by default.

        Returns:
            A new module, cut from any graph; the parameters that are trained require gradients, and no others do.

        Raises:
            ParameterError: a name is missing, unknown, or of another shape.
        """
        self._values(params)
        buffers = self.buffers() if buffers is None else buffers
        self._check_buffers(buffers)
        held: dict[str, Tensor] = {name: x.detach().clone() for name, x in buffers.items()}
        held |= {name: nn.Parameter(params[name].detach().clone()) for name in self._trained}
        held |= {name: nn.Parameter(place.read().detach().clone(), False) for name, place in self._frozen.items()}
        return filled(self._writing, held)

    def _values(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check the parameters and put each under all its paths, beside the constants."""
        try:
            known = {name: x.shape for name, x in params.items()} == self._shapes
        except AttributeError:
            known = False
        if not known:
            self._explain(params)
        values = params.copy()
        for path, name in self._ties:
            values[path] = params[name]
        for place, path in self._constants:
            x = place.read()
            values[path] = x.detach() if x.requires_grad else x
        return values

    @staticmethod
    def _own(trees: Any, needed: bool) -> Any:
        return mapped(trees) if needed and _tracing.mapping() else lambda x: x

    def _moved(self, before: dict[str, Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the new buffers out of what functional_call wrote back, reassigned ones too."""
        after = {}
        for name, old in before.items():
            new = values[self._buffers[name].paths[0]]
            if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
                came = f"{new.dtype}, shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
                raise DefinitionError(
                    f"{self!r}: its forward turns the buffer '{name}' from {old.dtype}, shape {tuple(old.shape)}, into "
                    f"{came}; buffers keep their dtype and shape."
                )
            after[name] = new.detach()
        return after

    def _check_buffers(self, buffers: dict[str, Tensor]) -> None:
        try:
            known = {name: x.shape for name, x in buffers.items()} == self._buffer_shapes
        except AttributeError:
            known = False
        if not known:
            _explain(f"Stateless({self._name})", "buffer", "buffers", buffers, self._buffer_shapes)

    def _explain(self, params: Any) -> None:
        """Raise for parameters that are not the module's trained ones, each once."""
        owner = f"Stateless({self._name})"
        ties = dict(self._ties)
        for name in params if isinstance(params, dict) else ():
            if name in self._frozen:
                raise ParameterError(
                    f"{owner}: '{name}' is frozen, a constant of the module; leave it out, or name it in train= to train it."
                )
            if name in ties:
                raise ParameterError(f"{owner}: '{name}' is tied to '{ties[name]}'; give '{ties[name]}' alone.")
            if name in self._buffers:
                raise ParameterError(f"{owner}: '{name}' is a buffer, not a parameter; hand buffers over by buffers=.")
        _explain(owner, "parameter", "params", params, self._shapes)

    def __repr__(self) -> str:
        """Name the module and count its parameters, frozen ones apart, and its buffers."""
        counts = [f"{sum(shape.numel() for shape in self._shapes.values()):,} parameters"]
        if self._frozen:
            counts.append(f"{sum(place.read().numel() for place in self._frozen.values()):,} frozen")
        if self._buffers:
            counts.append(f"{len(self._buffers)} buffers")
        return f"Stateless({', '.join((self._name, *counts))})"


def _explain(owner: str, kind: str, method: str, given: Any, shapes: Mapping[str, torch.Size]) -> None:
    """Raise for tensors by name that are not those of a module."""
    if not isinstance(given, dict):
        module = "; a module's values are a dict" if isinstance(given, nn.Module) else ""
        call = "net(params, x)" if kind == "parameter" else "net(params, x, buffers=net.buffers())"
        raise ParameterError(
            f"{owner} takes a dict of {kind}s{' first' * (kind == 'parameter')}, but {type(given).__name__} came{module}; "
            f"call {call}."
        )
    for missing in shapes:
        if missing not in given:
            raise ParameterError(f"{owner}: {kind} '{missing}' is missing; {listing(given)} came.")
    for name, x in given.items():
        if name not in shapes:
            raise ParameterError(f"{owner} has no {kind} '{name}'{suggest(str(name), shapes)} It has {listing(shapes)}.")
        if not isinstance(x, Tensor):
            raise ParameterError(f"{owner}: {kind} '{name}' is {type(x).__name__}; expected a tensor.")
        if x.shape != shapes[name]:
            raise ParameterError(
                f"{owner}: {kind} '{name}' has shape {tuple(x.shape)}, expected {tuple(shapes[name])}; net.{method}() has "
                "them all."
            )
