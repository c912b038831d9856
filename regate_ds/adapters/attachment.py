"""Remember what was replaced on a model, so that the model can be left as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
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

        RuntimeError if the instance's forward is already replaced; all earlier replacements of this
        attachment are then removed.
        """
        self.rebind(module, "forward", forward, **bound)

    def rebind(
        self, module: nn.Module, name: str, method: Callable[..., Any], **bound: Any
    ) -> None:
        """Replace another method of the module, in the same way."""
        if name in vars(module):
            self.remove()
            raise RuntimeError(
                f"{type(module).__name__}.{name} is already replaced on this model; "
                "remove() the other attachment first"
            )
        host_method = getattr(module, name)
        # A partial, not a closure: a deep copy of the model then calls the copy's own method.
        replacement = partial(method, host_method, **bound)
        # Hosts read the signature, for example to decide which inputs generation may pass.
        replacement.__signature__ = inspect.signature(host_method)  # type: ignore[attr-defined]
        setattr(module, name, replacement)
        self._restores.append(partial(delattr, module, name))

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
