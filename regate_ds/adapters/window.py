"""The micro-batches of one optimizer step, as a training loop gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regate_ds.algorithm.select import ElisionPlan
from regate_ds.data.collate import Batch, moved


class Window(Sequence[tuple[Any, ElisionPlan | None]]):
    """The micro-batches of one optimizer step with their plans; each is moved when it is taken."""

    def __init__(
        self, micro: Sequence[Any], plans: Sequence[ElisionPlan | None], device: torch.device
    ) -> None:
        self._micro, self._plans, self._device = micro, plans, device

    def __len__(self) -> int:
        return len(self._micro)

    def __getitem__(self, number: Any) -> Any:
        batch, plan = self._micro[number], self._plans[number]
        inputs = batch.inputs if isinstance(batch, Batch) else batch
        if isinstance(inputs, Mapping):
            inputs = moved(dict(inputs), self._device)
        return inputs, None if plan is None else plan.to(self._device)
