"""Remember what was replaced on a model, so that the model can be left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attachment:
    """Everything replaced on one model. It never changes the name of a parameter."""

    def __init__(self) -> None:
        self._restores: list[Callable[[], None]] = []

    def rebind_forward(self, module: nn.Module, forward: Callable[..., Any], **bound: Any) -> None:
        """Replace the module's forward by ``forward(host_forward, *args, **kwargs)``.

        bound: keyword arguments that every call of ``forward`` gets.

        RuntimeError if the instance's forward is already replaced, by another than accelerate,
        which moves inputs to a device; all earlier replacements of this attachment are then
        removed.
        """
        self.rebind(module, "forward", forward, **bound)

    def rebind(
        self, module: nn.Module, name: str, method: Callable[..., Any], **bound: Any
    ) -> None:
        """Replace another method of the module, in the same way."""
        self._rebind(module, name, method, _is_accelerates, bound)

    def displace(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        *,
        is_known: Callable[[Any], bool],
        **bound: Any,
    ) -> None:
        """Replace a method also where a host has put its own on the instance; ``remove`` puts that
        back.

        is_known: whether what is there is what may be displaced. RuntimeError if it is not.
        """
        self._rebind(module, name, method, lambda f: is_known(f) or _is_accelerates(f), bound)

    def _rebind(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        may_displace: Callable[[Any], bool],
        bound: dict[str, Any],
    ) -> None:
        displaced = vars(module).get(name)
        if displaced is not None and not may_displace(displaced):
            self.remove()
            raise RuntimeError(
                f"{type(module).__name__}.{name} is already replaced on this model; "
                "remove() the other attachment first"
            )
        host_method = getattr(module, name)
        signature = inspect.signature(host_method)
        if isinstance(host_method, partial):
            host_method = MethodType(host_method.func, module)
        # A partial, not a closure: a deep copy of the model then calls the copy's own method.
        replacement = partial(method, host_method, **bound)
        # Hosts read the signature, for example to decide which inputs generation may pass.
        replacement.__signature__ = signature  # type: ignore[attr-defined]
        setattr(module, name, replacement)
        if displaced is None:
            self._restores.append(partial(delattr, module, name))
        else:
            self._restores.append(partial(setattr, module, name, displaced))

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the module's class on this instance."""
        setattr(module, name, value)
        self._restores.append(partial(delattr, module, name))

    def add_hook(self, handle: RemovableHandle) -> None:
        """Remember a forward hook that is already registered, so that ``remove`` removes it too."""
        self._restores.append(handle.remove)

    def remove(self) -> None:
        """Undo every replacement, so that the model is as it was found."""
        while self._restores:
            self._restores.pop()()


def _is_accelerates(forward: Any) -> bool:
    """Return whether accelerate has put this forward on a module, as it does for ``device_map`` and
    quantized models: it calls its hook, and the module's own forward."""
    return isinstance(forward, partial) and forward.func.__module__ == "accelerate.hooks"
