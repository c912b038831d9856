"""Attach ReGATE at the first step of a loop around Megatron-core that the user does not edit.

`megatron_lm.py` puts it into Megatron-LM's loop, and `megatron_bridge.py` into Megatron-Bridge's.
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
from regate_ds.adapters.megatron.samples import ImageTokens, RepeatedTokens, read_tokens
from regate_ds.algorithm.batch import TokenBatch
from regate_ds.config import RegateConfig
from regate_ds.stores.image_orders.reader import ImageOrderStore
from regate_ds.stores.reference.reader import ReferenceStore


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of ReGATE that the host's own configuration does not have."""

    elision: RegateConfig
    """The knobs of the method."""

    reference: Path | None = None
    """Folder of the teacher's losses; null where the score reads none."""

    orders: Path | None = None
    """Folder of the orders of image tokens; null if `images.ranking` reads none."""

    dataset: str = "train"
    """Name of the training data in the keys of its samples, the same as in the reference store."""

    row_format: RowFormat = "padded"
    """`padded` for rows of one length, `ragged` for kept tokens one after the other (this needs
    Transformer Engine)."""

    image: ImageTokens | None = None
    """How the model puts image embeddings in the place of tokens; null for a text model."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What the host knows once its run begins; asked at the first step."""

    total_steps: Callable[[], int]
    """Optimizer steps of the whole run."""

    resume: Callable[[], Path | None] = lambda: None
    """The checkpoint folder that the host has loaded, if it has loaded one."""

    image: Callable[[], ImageTokens | RepeatedTokens | None] = lambda: None
    """How the model takes images, where the settings do not say it."""


class DeferredAttach:
    """One rank's part in a run of a host that builds its model late: attached at the first step."""

    def __init__(
        self,
        settings: LoopSettings,
        host: HostFacts,
        *,
        tokens: Callable[[Any], TokenBatch] | None = None,
    ) -> None:
        """Take settings, and what the host will know.

        tokens: reads an item of the data iterator; without it ``read_tokens`` reads the dicts of
            Megatron's names.
        """
        self.settings, self._host = settings, host
        self._tokens = tokens or self._read
        self.regate: MegatronRegate | None = None
        """None before the first step."""

    def wrap(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        """Return what to call in place of Megatron's forward-backward function.

        It attaches at its first call that trains; calls with ``forward_only`` go to the host.
        """
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
        """End a step, after the optimizer's step. All ranks must call it."""
        if self.regate is not None:
            self.regate.step(applied=applied)

    def abandon_step(self) -> None:
        """Forget the planned step, because the host leaves it to a later job."""
        if self.regate is not None:
            self.regate.abandon()

    def save(self, folder: Path) -> None:
        """Write schedule and difficulty into a checkpoint folder. All ranks must call it."""
        if self.regate is not None:
            self.regate.save(folder)

    def _read(self, item: Any) -> TokenBatch:
        return read_tokens(item, image=self.settings.image or self._host.image())

    def _attach(self, models: Sequence[nn.Module] | nn.Module) -> None:
        settings = self.settings
        store = None if settings.reference is None else ReferenceStore(settings.reference)
        orders = None if settings.orders is None else ImageOrderStore(settings.orders)
        self.regate = attach(
            models,
            settings.elision,
            total_steps=self._host.total_steps(),
            reference=store,
            orders=orders,
            row_format=settings.row_format,
            tokens=self._tokens,
        )
        if (folder := self._host.resume()) is not None:
            self.regate.load(folder)
