"""The jump in loss where a run goes from patches of tokens to single ones.

The losses on both sides are of other things: a patch predicts several tokens, of which it sees none
of the others. How far the loss falls says how much of what patches taught carries over.
"""

from __future__ import annotations

import logging
from collections import deque

import torch

from regate_ds.open_step import OpenStep

_log = logging.getLogger(__name__)

LENGTH = 8
"""Merged steps whose mean loss stands for that before the switch: one step's is noisy."""


class Switch:
    """Mean losses of this rank's targets before and at the first step behind the merged ones."""

    def __init__(self, first_step: int) -> None:
        """first_step: the first step that is not merged."""
        self._first_step = first_step
        self._before: deque[float] = deque(maxlen=LENGTH)

    def figures(self, step: int, current: OpenStep) -> dict[str, float]:
        """Take a step that ends; return ``loss_merged`` and ``loss_single`` at the switch, else {}.

        They are in nats a target. A run that was resumed at the switch knows the second alone.
        """
        if not self._first_step - LENGTH <= step <= self._first_step:
            return {}
        losses = torch.cat([one["loss"].reshape(-1) for one in current.recorded.values()])
        mean = float(losses.double().mean()) if len(losses) else float("nan")
        if step < self._first_step:
            self._before.append(mean)
            return {}
        found = {"loss_single": mean}
        if self._before:
            found["loss_merged"] = sum(self._before) / len(self._before)
        _log.info(
            "step %d is the first on single tokens: its loss is %.4f, that of the last %d merged "
            "steps was %.4f",
            *(step, mean, len(self._before), found.get("loss_merged", float("nan"))),
        )
        return found
