"""What the benchmark asks of a host, and one arm's step in its three parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from regate_ds.algorithm.plan import ElisionPlan, StepPlan
from regate_ds.algorithm.window import plan_dense_window
from regate_ds.cost.shape import ModelShape
from regate_ds.data.collate import Batch

ENDLESS = 1_000_000
"""Optimizer steps of a run that no benchmark reaches the end of."""

OnDevice = Callable[[ElisionPlan], ElisionPlan]


@dataclass(frozen=True)
class StepParts:
    """One step of one arm."""

    plan: Callable[[], StepPlan | None]
    """Plans the step, with what the stores hold; None where the host's own call does it."""

    passes: Callable[[StepPlan | None, OnDevice], Any]
    """Runs the passes, forward and backward; returns what ``end`` needs. Its second argument puts a
    micro-batch's plan on the device."""

    end: Callable[[StepPlan | None, Any], None]
    """Ends the step: what was learnt goes to the stores."""

    followed: Callable[[], Sequence[ElisionPlan]]
    """Returns the plans of the micro-batches that the passes have followed."""


class StepHost(Protocol):
    """A framework with a model in it, on this rank."""

    shape: ModelShape
    """Of the whole model."""

    layers: list[nn.Module]
    """The decoder layers of this rank."""

    weights: list[nn.Parameter]

    def ready(self, name: str) -> AbstractContextManager[StepParts]:
        """Prepare a step of the arm; it is undone behind the block."""
        ...


def plans_followed(regate: Any, batches: Sequence[Batch]) -> Sequence[ElisionPlan]:
    """Return the plans of the step that ran; where none was made, those of a dense step."""
    if regate is not None and regate.plan is not None:
        return regate.plan.micro
    return plan_dense_window([batch.tokens for batch in batches])
