"""The state of a loop, whose session is opened with its first window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regate_ds.adapters.session_state import Opened, read_state
from regate_ds.config import RegateConfig

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


class Stateful:
    """A run that saves and loads its state."""

    config: RegateConfig
    _state: LateState

    def save(self, checkpoint_dir: str | Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. Every data rank must call it."""
        if self.config.enabled:
            self._require_opened().save(checkpoint_dir)

    def load(self, checkpoint_dir: str | Path) -> None:
        """Load what ``save`` wrote; the number of data ranks may differ from the saved one.

        Before the host is known the checkpoint is only looked at, and loaded with the first
        window. Every data rank must call it.
        """
        if self.config.enabled:
            read_state(checkpoint_dir)
            self._state.load(checkpoint_dir)

    def state_dict(self) -> dict[str, bytes]:
        """Return what ``save`` writes, the same on every data rank; ``{}`` with enabled=False.

        It serves torch.distributed.checkpoint and ``accelerator.register_for_checkpointing``; the
        number of data ranks may differ at loading. Every data rank must call it.
        """
        return self._state.packed() if self.config.enabled else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, as ``load`` does. Every data rank must call it."""
        if self.config.enabled:
            self._state.load(require_packed(state))

    @property
    def _opened(self) -> Opened | None:
        return self._state.opened

    def _require_opened(self) -> Opened:
        if self._opened is None:
            raise RuntimeError(
                f"no engine is known yet (enabled={self.config.enabled}): first iterate over "
                "regate.windows(loader, engine), by an Accelerator or a Loop if there is no "
                "engine, with enabled=True in RegateConfig"
            )
        return self._opened
