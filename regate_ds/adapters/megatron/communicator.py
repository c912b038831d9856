"""Transfer tensors between pipeline stages, with shapes that each stage reads from the plan.

Megatron's own communicator either assumes one shape, or asks the neighbour before each transfer.
Here each stage knows the shapes, because micro-batches arrive in the order of the schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from torch.distributed import ProcessGroup

from regate_ds.adapters.megatron.local.plan import LocalPlan

Shape = tuple[int, int, int]
"""[S, B, H] of one transfer."""


@dataclass(frozen=True)
class Boundary:
    """Whether kept rows only, not full sequences, cross the two edges of a stage."""

    packed_before: bool
    packed_after: bool


class PlannedCommunicator(P2PCommunicator):
    """A communicator that knows the shapes of all receives, and counts the bytes it sends."""

    def __init__(
        self,
        group: ProcessGroup,
        config: Any,
        arriving: Sequence[Shape],
        returning: Sequence[Shape],
    ) -> None:
        """Take the shapes of all receives of a step.

        arriving: shapes of activations from the previous stage, in the order of the schedule.
        returning: shapes of gradients from the next stage, in the order of the schedule.
        """
        super().__init__(group, config)
        # With this flag the host calls _communicate_shapes, which sends nothing here.
        self.config = copy.copy(config)
        self.config.variable_seq_lengths = True
        self._arriving, self._returning = iter(arriving), iter(returning)
        self.num_bytes_sent = 0

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        """Return the shapes of the next receives from the previous and from the next stage."""
        for tensor in (tensor_send_next, tensor_send_prev):
            if tensor is not None:
                self.num_bytes_sent += tensor.numel() * tensor.element_size()
        arriving = next(self._arriving) if recv_prev else None
        return arriving, next(self._returning) if recv_next else None


def micro_order(
    num_micro: int, stage: int, num_stages: int, num_chunks: int, group_size: int
) -> tuple[list[int], list[int]]:
    """Return micro-batch numbers in the order in which a stage receives them.

    The first list is of activations from the previous stage, the second of gradients from the next.
    """
    if num_chunks == 1:
        return list(range(num_micro)), list(range(num_micro))
    table = get_schedule_table(num_micro, num_chunks, group_size)
    all_chunks = [micro for micro, _ in table]
    # At the ends of the pipeline the model's first or last chunk has no neighbour to receive from.
    one_chunk_less = [micro for micro, chunk in table if chunk != num_chunks - 1]
    return (
        one_chunk_less if stage == 0 else all_chunks,
        one_chunk_less if stage == num_stages - 1 else all_chunks,
    )


def shapes(
    micro: Sequence[LocalPlan], order: Sequence[int], packed: bool, hidden: int
) -> list[Shape]:
    """Return the shapes of a stage's receives; ``order`` has their micro-batch numbers."""
    chosen = [micro[number] for number in order]
    return [(*(m.kept_shape if packed else m.full_shape), hidden) for m in chosen]
