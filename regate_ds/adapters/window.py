"""The micro-batches of one optimizer step, as a training loop gets them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.collate import Batch, moved

_log = logging.getLogger(__name__)


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


def require_collated(micro: Sequence[Any]) -> None:
    """Refuse micro-batches whose samples are not named."""
    if not all(isinstance(batch, Batch) for batch in micro):
        raise ValueError(
            f"the loader yields {type(micro[0]).__name__}; give it "
            "collate_fn=regate.collate(collate)"
        )


def in_steps(loader: Iterable[Any], size: int, *, keep_rest: bool) -> Iterator[list[Any]]:
    """Groups of ``size`` micro-batches; what is left at the end is told, if it is not kept."""
    micro: list[Any] = []
    for batch in loader:
        micro.append(batch)
        if len(micro) == size:
            yield micro
            micro = []
    if micro and keep_rest:
        yield micro
    elif micro:
        _log.warning(
            "left out %d micro-batches at the end of the epoch: a step takes %d; the same "
            "samples each time, unless the loader changes its order",
            len(micro),
            size,
        )
