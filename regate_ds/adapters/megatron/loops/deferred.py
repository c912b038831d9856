"""ReGATE in a loop around Megatron-core that is not ours to edit: it attaches at the first step.

``megatron_lm.py`` puts it into Megatron-LM's loop, ``bridge.py`` into Megatron-Bridge's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from regate_ds.adapters.megatron.attach import RowFormat, attach
from regate_ds.adapters.megatron.regate import MegatronRegate
from regate_ds.adapters.megatron.samples import ImageTokens, read_tokens
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from regate_ds.stores.reference.reader import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What a host's own configuration does not say."""

    elision: RegateConfig
    """The knobs of the method."""

    reference: Path | None = None
    """Folder of the teacher's losses; null with keep_share 1.0."""

    dataset: str = "train"
    """Name of the training data in the keys of samples, as in the reference store."""

    row_format: RowFormat = "padded"
    """Rows of one length, or one after the other (`ragged`; needs Transformer Engine)."""

    image: ImageTokens | None = None
    """Where the model puts image embeddings in place of tokens; null for text."""


class DeferredAttach:
    """One rank's part in a host's run, whose model it gets to know with the first step."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        tokens: Callable[[Any], TokenBatch] | None = None,
        resume: Callable[[], Path | None] = lambda: None,
    ) -> None:
        """tokens: reads an item of the data iterator, where it is not a dict of Megatron's names.
        resume: the checkpoint folder that the host has loaded, if it has; asked at the first step.
        """
        self._settings, self._resume = settings, resume
        self._tokens = tokens or (
            lambda item: read_tokens(item, settings.dataset, image=settings.image)
        )
        self.regate: MegatronRegate | None = None
        """None before the first step."""

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """What to use in place of Megatron's forward-backward function."""
        planned: Callable[..., Any] | None = None

        @wraps(schedule)
        def forward_backward(**arguments: Any) -> Any:
            nonlocal planned
            if arguments.get("forward_only", False):
                return schedule(**arguments)
            if self.regate is None:
                self._attach(arguments["model"])
            if planned is None:
                assert self.regate is not None
                planned = self.regate.wrap(schedule)
            return planned(**arguments)

        return forward_backward

    def end_step(self, *, applied: bool) -> None:
        """After the optimizer's step. All ranks call it."""
        if self.regate is not None:
            self.regate.step(applied=applied)

    def abandon_step(self) -> None:
        """The host leaves the step to a later job."""
        if self.regate is not None:
            self.regate.abandon()

    def save(self, folder: Path) -> None:
        """Into a checkpoint of the host. All ranks call it."""
        if self.regate is not None:
            self.regate.save(folder)

    def _attach(self, models: Sequence[nn.Module] | nn.Module) -> None:
        settings = self._settings
        store = None if settings.reference is None else ReferenceStore(settings.reference)
        self.regate = attach(
            models,
            settings.elision,
            reference=store,
            row_format=settings.row_format,
            tokens=self._tokens,
        )
        if (folder := self._resume()) is not None:
            self.regate.load(folder)
