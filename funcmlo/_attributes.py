"""A module's plain attributes, put back after each call: what a forward leaves there cannot reach the next one."""

from __future__ import annotations

from collections import deque
from operator import is_
from typing import Any

from torch import Tensor, nn

from funcmlo.errors import DefinitionError

_OWN = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers"}
_MISSING = object()


class Attributes:
    """The attributes of a module's parts as they are now.

    A forward may fill an attribute that is empty (absent, `None`, an empty container, a dict's new key): that is a cache
    or a note, and is forgotten after the call. One that changes any other attribute (a counter, a running average, a
    hidden state) is no function of its inputs.

    Args:
        module: the module, nobody else's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # torch's own parts leave their attributes alone; only recurrent ones keep notes, of their weights.
        self._parts = [
            _Part(path, part)
            for path, part in module.named_modules()
            if not type(part).__module__.startswith("torch.nn.")
            or isinstance(part, nn.RNNBase)
            or part._forward_hooks
            or part._forward_pre_hooks
        ]

    def __reduce__(self) -> tuple[type[Attributes], tuple[nn.Module]]:
        """Copies look after the copied module."""
        return Attributes, (self._module,)

    def restore(self, owner: str | None) -> None:
        """Put everything back.

        Args:
            owner: who called, for the message; without it nothing is raised.

        Raises:
            DefinitionError: an attribute was changed that was not empty.
        """
        for part in self._parts:
            if not part.same():
                change = part.restore()
                if owner is not None and change is not None:
                    raise DefinitionError(
                        f"{owner}: its forward changes {change}, so that it is no function of its inputs. Pass the value as "
                        "an input, or keep it in a buffer (register_buffer) and call net(params, x, buffers=…); fill a "
                        "cache by calling the module once before it is wrapped."
                    )


class _Part:
    """A submodule's attributes, what is in those that are containers, and the versions of those that are tensors."""

    def __init__(self, path: str, part: nn.Module) -> None:
        self._path, self._part, self._notes = path, part, isinstance(part, nn.RNNBase)
        self._saved = dict(part.__dict__)
        self._values = tuple(self._saved.values())
        own = {key: value for key, value in self._saved.items() if key not in _OWN}
        containers = {key: value for key, value in own.items() if isinstance(value, (dict, list, set, deque))}
        self._contents: list[tuple[str, Any, Any, tuple[Any, ...]]] = [
            (key, value, value.copy(), _items(value)) for key, value in containers.items()
        ]
        self._versions = [(key, value, value._version) for key, value in own.items() if _counted(value)]

    def same(self) -> bool:
        """Say whether nothing was changed, quickly."""
        now = self._part.__dict__
        return (
            len(now) == len(self._values)
            and all(map(is_, now.values(), self._values))
            and all(_same(_items(value), items) for _, value, _, items in self._contents)
            and all(value._version == version for _, value, version in self._versions)
        )

    def restore(self) -> str | None:
        """Put everything back and say what was changed, if something was that was not empty."""
        now, changes = dict(self._part.__dict__), list[tuple[str, str]]()
        for key, value in self._saved.items():
            new = now.get(key, _MISSING)
            if new is not value and value is not None and not _empty(value) and not _equal(value, new):
                changes.append((key, _difference(value, new)))
        self._part.__dict__.clear()
        self._part.__dict__.update(self._saved)
        for key, value, saved, items in self._contents:
            if _same(_items(value), items):
                continue
            grown = isinstance(value, dict) and all(v is None or value.get(k) is v for k, v in saved.items())
            if saved and not grown:
                changes.append((key, ""))
            value.clear()
            (value.update if isinstance(value, (dict, set)) else value.extend)(saved)
        # What was written into a tensor cannot be put back; the attribute stays changed, and every call says so.
        changes += [(key, "") for key, value, version in self._versions if value._version != version]
        if self._notes or not changes:
            return None
        key, difference = changes[0]
        return f"the attribute '{f'{self._path}.' * bool(self._path)}{key}'{difference}"


def _counted(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _items(container: Any) -> tuple[Any, ...]:
    return (*container, *container.values()) if isinstance(container, dict) else tuple(container)


def _same(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _empty(value: Any) -> bool:
    return isinstance(value, (dict, list, set, deque, tuple)) and not value


def _equal(before: Any, after: Any) -> bool:
    plain = (bool, int, float, complex, str)
    return isinstance(before, plain) and isinstance(after, plain) and before == after


def _difference(before: Any, after: Any) -> str:
    plain = (bool, int, float, complex, str)
    return f" ({before!r} before, {after!r} after)" if isinstance(before, plain) and isinstance(after, plain) else ""
