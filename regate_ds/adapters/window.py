"""A window: the micro-batches of one optimizer step, as a training loop receives them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from regate_ds.algorithm.batch import TokenBatch, host_labels
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.collate import Batch, moved

PLAN = "regate_plan"
"""Name under which a micro-batch carries its plan to the model."""

TOWER = "regate_tower"
"""Name under which it carries the calls of the vision tower that ranks agreed on."""

_log = logging.getLogger(__name__)


class Window(Sequence[Any]):
    """The micro-batches of one optimizer step, each with its plan in it.

    Without elision a micro-batch is the host's own. It is moved to the device when it is read.
    """

    def __init__(
        self,
        micro: Sequence[Any],
        plans: Sequence[ElisionPlan | None],
        device: torch.device,
        tower: Sequence[tuple[str, ...]] = (),
    ) -> None:
        """tower: the calls of each micro-batch; empty if ranks did not agree on any."""
        self._micro, self._plans, self._device, self._tower = micro, plans, device, tower

    def __len__(self) -> int:
        return len(self._micro)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return Window(
                self._micro[number], self._plans[number], self._device, self._tower[number]
            )
        batch, plan = self._micro[number], self._plans[number]
        if plan is not None:
            inputs = moved(batch.inputs, self._device)
            for name in {PLAN, TOWER} & inputs.keys():
                raise ValueError(f"the batch has an input {name!r}, the plan's own name; rename it")
            agreed = {TOWER: self._tower[number]} if self._tower else {}
            return {**inputs, PLAN: plan.to(self._device), **agreed}
        inputs = _with_labels(batch) if isinstance(batch, Batch) else batch
        return moved(dict(inputs), self._device) if isinstance(inputs, Mapping) else inputs

    def planned(self) -> Iterator[tuple[TokenBatch, ElisionPlan]]:
        """Yield each micro-batch's tokens and its plan, on the CPU; nothing without elision."""
        for batch, plan in zip(self._micro, self._plans, strict=True):
            if plan is not None:
                yield batch.tokens, plan


def _with_labels(batch: Batch) -> dict[str, Any]:
    """Return the host's own batch, of which ``KeyedCollate`` took the labels."""
    return {"labels": host_labels(batch.tokens.labels_BT), **batch.inputs}


def require_collated(micro: Sequence[Any]) -> None:
    """Refuse micro-batches whose samples have no keys: ValueError names the type that was found."""
    others = [type(batch).__name__ for batch in micro if not isinstance(batch, Batch)]
    if others:
        raise ValueError(
            f"the loader yields {others[0]}; give it collate_fn=regate.collate(collate)"
        )


def window_tokens(micro: Sequence[Any]) -> list[TokenBatch]:
    """Return what the method knows of each micro-batch; ValueError as ``require_collated``."""
    require_collated(micro)
    return [batch.tokens for batch in micro]


def in_steps(loader: Iterable[Any], size: int, *, keep_rest: bool) -> Iterator[list[Any]]:
    """Yield groups of ``size`` micro-batches.

    Micro-batches at the end that do not fill a group are yielded if ``keep_rest`` is true;
    otherwise a warning in the log says how many are left out. ValueError if there is no group.
    """
    micro: list[Any] = []
    has_group = keep_rest
    for batch in loader:
        micro.append(batch)
        if len(micro) == size:
            has_group = True
            yield micro
            micro = []
    if micro and not has_group:
        raise ValueError(
            f"the loader ended after {len(micro)} of the {size} micro-batches of a step, so there "
            "is no step; give more samples, or accumulate over fewer"
        )
    if micro and keep_rest:
        yield micro
    elif micro:
        _log.warning(
            "left out the last %d micro-batches of the epoch: a step takes %d; shuffle the "
            "loader every epoch, or it will leave out the same samples each time",
            len(micro),
            size,
        )
