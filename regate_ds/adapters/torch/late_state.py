"""The state of a loop, whose session is opened with its first window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regate_ds.adapters.session_state import Opened

_NAME = "regate"
"""The one entry of a state dict."""


class LateState:
    """The session, once it is open. What is loaded earlier waits for it."""

    def __init__(self) -> None:
        self.opened: Opened | None = None
        self._waiting: str | Path | bytes | None = None

    def open(self, opened: Opened) -> None:
        self.opened = opened
        if self._waiting is not None:
            self.load(self._waiting)
            self._waiting = None

    def load(self, source: str | Path | bytes) -> None:
        """Load from a checkpoint folder, or from what ``packed`` has put into a state dict."""
        if self.opened is None:
            self._waiting = source
        elif isinstance(source, bytes):
            self.opened.unpack(source)
        else:
            self.opened.load(source)

    def packed(self) -> dict[str, bytes]:
        """Return a state dict; before the session is open, what waits for it, or one to be loaded
        into. RuntimeError if a checkpoint folder waits, which is read with the first window."""
        if self.opened is not None:
            return {_NAME: self.opened.packed()}
        if isinstance(self._waiting, (str, Path)):
            raise RuntimeError(
                f"the state in {self._waiting} is read with the first window; save after it"
            )
        return {_NAME: self._waiting or b""}


def require_packed(state: Mapping[str, Any]) -> bytes:
    """Return what ``LateState.packed`` has put into a state dict; ValueError if it has not."""
    packed = state.get(_NAME)
    if not packed:
        raise ValueError(
            f"the checkpoint has no state of ReGATE ({sorted(state)}); resume from one that was "
            "saved after the first window, with enabled=True"
        )
    return packed
