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

    def __init__(self, may_displace: Callable[[Any], bool] = lambda _: False) -> None:
        """may_displace: whether a method that a host has put on an instance may be replaced there,
        until ``remove`` puts it back."""
        self._may_displace = may_displace
        self._restores: list[Callable[[], None]] = []

    def rebind_forward(self, module: nn.Module, forward: Callable[..., Any], **bound: Any) -> None:
        """Replace the module's forward by ``forward(host_forward, *args, **kwargs)``.

        bound: keyword arguments that every call of ``forward`` gets.

        RuntimeError if the instance's forward is already replaced, by another than accelerate,
        which moves inputs to a device, or what may be displaced; all earlier replacements of this
        attachment are then removed.
        """
        self.rebind(module, "forward", forward, **bound)

    def rebind(
        self, module: nn.Module, name: str, method: Callable[..., Any], **bound: Any
    ) -> None:
        """Replace another method of the module, in the same way."""
        displaced = vars(module).get(name)
        known = (_is_accelerates, self._may_displace)
        if displaced is not None and not any(is_known(displaced) for is_known in known):
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
