"""What a training loop's host must tell: its ranks, and what it does to gradients."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.algorithm.plan import StepPlan


class LoopHost(Protocol):
    """The framework around a training loop. `plain.py`, `accelerator.py` and `engine.py` have one
    each."""

    @property
    def given(self) -> Any:
        """What the user handed over."""
        ...

    @property
    def name(self) -> str:
        """What the user handed over, in a word."""
        ...

    @property
    def joined_by(self) -> str:
        """The call by which the ranks join, which must come before ``attach``."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model wants its inputs, and the group's backend its tensors."""
        ...

    @property
    def num_ranks(self) -> int:
        """Number of ranks that see different samples."""
        ...

    @property
    def group(self) -> ProcessGroup | None:
        """These ranks; None if there is one."""
        ...

    @property
    def accumulation(self) -> int:
        """Number of micro-batches of an optimizer step."""
        ...

    @property
    def divides_by_accumulation(self) -> bool:
        """Whether the host itself divides what it is given by ``accumulation``."""
        ...

    @property
    def divides_ranks_by(self) -> float:
        """By what the host divides the sum of the ranks' gradients."""
        ...

    @property
    def stage(self) -> int:
        """The ZeRO stage that asks of the ranks what this host asks: 1 that all reduce the same
        parameters, as DDP; 3 that all enter modules alike, as FSDP2."""
        ...

    @property
    def steps_taken(self) -> int:
        """Optimizer steps before this run, where the host has counted them; else 0."""
        ...

    def require(self) -> None:
        """Refuse, by ValueError, what the method does not support. Called with elision only."""
        ...

    def require_boundary(self) -> None:
        """Refuse, by RuntimeError, to plan a step where the host, by its own count, is within one.
        Called with elision only."""
        ...

    def begin(self, num_micro: int) -> None:
        """Make ready for a step of so many micro-batches, which have been read already."""
        ...


def gradient_scale(host: LoopHost) -> float:
    """Return the factor that undoes all divisions of the host: what the gradient of a micro-batch
    must be multiplied by, so that the step's gradient is the sum over ranks and micro-batches."""
    return host.divides_ranks_by * (host.accumulation if host.divides_by_accumulation else 1)


def averaged(loss: Tensor, host: LoopHost, plan: StepPlan | None = None) -> Tensor:
    """Divide a micro-batch's mean by the number of them where the host leaves that to the loop: of
    those that were planned, or without a plan by the accumulation, as loops do."""
    number = host.accumulation if plan is None else len(plan.micro)
    return loss if host.divides_by_accumulation or number == 1 else loss / number
