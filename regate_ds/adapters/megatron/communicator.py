"""Point-to-point transfers between pipeline stages whose shapes the plan tells.

Megatron's own communicator either assumes one shape, or asks the neighbour before each transfer.
Here each stage looks the shape up: micro-batches arrive in the order of the schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch.distributed import ProcessGroup

from regate_ds.adapters.megatron.local_plan import LocalPlan

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Boundary:
    """What crosses the edges of a stage: full sequences, or kept rows only."""

    packed_before: bool
    packed_after: bool


class PlannedCommunicator(P2PCommunicator):
    """Receives what the plan says; counts the bytes that it sends."""

    def __init__(
        self,
        group: ProcessGroup,
        config: Any,
        arriving: Sequence[Shape],
        returning: Sequence[Shape],
    ) -> None:
        """Shapes of activations from the previous stage, and of gradients from the next."""
        super().__init__(group, config)
        # The host asks for shapes where they vary; it asks us, and we ask nobody.
        self.config = copy.copy(config)
        self.config.variable_seq_lengths = True
        self._arriving, self._returning = iter(arriving), iter(returning)
        self.num_bytes_sent = 0

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        for tensor in (tensor_send_next, tensor_send_prev):
            if tensor is not None:
                self.num_bytes_sent += tensor.numel() * tensor.element_size()
        arriving = next(self._arriving) if recv_prev else None
        return arriving, next(self._returning) if recv_next else None


def micro_order(
    num_micro: int, stage: int, num_stages: int, num_chunks: int, group_size: int
) -> tuple[list[int], list[int]]:
    """Micro-batches in the order in which a stage receives activations, and gradients."""
    if num_chunks == 1:
        return list(range(num_micro)), list(range(num_micro))
    table = get_schedule_table(num_micro, num_chunks, group_size)
    every = [micro for micro, _ in table]
    # At the ends of the pipeline the model's first or last chunk has no neighbour to hear from.
    looped = [micro for micro, chunk in table if chunk != num_chunks - 1]
    return (
        looped if stage == 0 else every,
        looped if stage == num_stages - 1 else every,
    )


def shapes(
    micro: Sequence[LocalPlan], order: Sequence[int], packed: bool, hidden: int
) -> list[Shape]:
    """Shapes of a stage's receives, in their order."""
    chosen = [micro[number] for number in order]
    return [(*(m.kept_shape if packed else m.full_shape), hidden) for m in chosen]
