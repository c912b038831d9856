"""Remember what was replaced on a model, so that it can be taken off again without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attachment:
    """Replaced ``forward`` methods of single module instances; parameter names never change."""

    def __init__(self) -> None:
        self._restores: list[Callable[[], None]] = []

    def rebind_forward(self, module: nn.Module, forward: Callable[..., Any], **bound: Any) -> None:
        """Call ``forward(host_forward, *args, **kwargs)`` in place of the module's own forward.

        RuntimeError if the instance's forward is replaced already.
        """
        if "forward" in vars(module):
            self.remove()
            raise RuntimeError(
                f"{type(module).__name__}.forward is already replaced on this model; "
                "remove() the other attachment first"
            )
        host_forward = module.forward
        # A partial, not a closure: a deep copy of the model then calls the copy's own forward.
        replacement = partial(forward, host_forward, **bound)
        # Hosts look at the signature, to decide which inputs generation may pass, for example.
        replacement.__signature__ = inspect.signature(host_forward)  # type: ignore[attr-defined]
        module.forward = replacement
        self._restores.append(partial(delattr, module, "forward"))

    def add_hook(self, handle: RemovableHandle) -> None:
        """Take a forward hook, registered already, off again with the rest."""
        self._restores.append(handle.remove)

    def remove(self) -> None:
        """Leave the model as it was found."""
        while self._restores:
            self._restores.pop()()
