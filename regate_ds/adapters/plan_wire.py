"""Send the plan of a step to every rank of a replica, as integers: one header and one array.

Pipeline stages must agree on all shapes before the schedule starts, because a collective inside the
schedule would wait for a rank that waits for its neighbour. So the rank that plans broadcasts the
plans of all micro-batches at once.

Header: status, optimizer step, dense or not, number of micro-batches, length of the array.
Array: first T, B, K and whether rows hold several samples, for each micro-batch; then, for each
micro-batch again, the kept positions (not in a dense step), segments and labels of all slots.
Shapes: T positions of a row, B rows, K slots of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.algorithm.plan import ElisionPlan, Slots, StepPlan, assemble_plan
from regate_ds.parallel.collectives import broadcast_integers

HEADER = 5
"""Number of integers in a header."""

_PLANNED, _FAILED = 0, 1


@dataclass(frozen=True)
class Sent:
    """The plans of one optimizer step, as a rank receives them."""

    step: int
    is_dense: bool
    micro: tuple[ElisionPlan, ...]


ENDED = torch.tensor([_PLANNED, 0, 0, 0, 0], dtype=torch.int32)
"""Header that the rank that plans sends when it has ended a step."""

FAILURE = torch.tensor([_FAILED, 0, 0, 0, 0], dtype=torch.int32)
"""Header that a rank sends when it could not plan, so that no rank waits for the array."""


def encode(step: int, is_dense: bool, micro: Sequence[ElisionPlan]) -> tuple[Tensor, Tensor]:
    """Return header and array of a step's plans, both int32."""
    shapes = [[p.num_tokens, *p.kept_BK.shape, int(p.is_packed)] for p in micro]
    parts = [torch.tensor(shapes).reshape(-1)]
    for plan in micro:
        tensors = (plan.segment_BK, plan.labels_BK)
        parts += [x.reshape(-1) for x in (tensors if is_dense else (plan.kept_BK, *tensors))]
    array = torch.cat(parts).to(torch.int32)
    header = [_PLANNED, step, int(is_dense), len(micro), len(array)]
    return torch.tensor(header, dtype=torch.int32), array


def array_length(header: Tensor) -> int:
    """Return the length of the array that follows; RuntimeError if the rank that plans failed."""
    status, *_, length = header.tolist()
    if status == _FAILED:
        raise RuntimeError(
            "the rank that plans for this one, on the last pipeline stage, has failed; read that "
            "rank's own error, which says why"
        )
    return length


def decode(header: Tensor, array: Tensor) -> Sent:
    """Rebuild the plans from what ``encode`` returned."""
    _, step, dense, num_micro, _ = header.tolist()
    shapes = array[: 4 * num_micro].reshape(-1, 4).tolist()
    values = array[4 * num_micro :].long()
    micro, start = [], 0
    for number, (num_tokens, num_rows, num_slots, is_packed) in enumerate(shapes):
        size = num_rows * num_slots
        slots = values[start : start + (2 if dense else 3) * size].view(-1, num_rows, num_slots)
        start += slots.numel()
        kept_BK = torch.arange(num_slots).expand(num_rows, -1) if dense else slots[0]
        plan = assemble_plan(
            Slots(kept_BK, slots[-2], slots[-1]),
            num_tokens=num_tokens,
            is_dense=bool(dense),
            is_packed=bool(is_packed),
        )
        micro.append(replace(plan, step=step, micro=number))
    return Sent(step, bool(dense), tuple(micro))


def share_plan(plan: StepPlan | Sent | None, planner: int, replica: ProcessGroup | None) -> Sent:
    """Return the plan of rank ``planner`` (of the world) on every rank of the replica.

    Collective over the replica. RuntimeError on all other ranks if that rank could not plan.
    """
    header, array = None, None
    if plan is not None:
        header, array = encode(plan.step, plan.is_dense, plan.micro)
    header = broadcast_integers(header, HEADER, planner, replica)
    array = broadcast_integers(array, array_length(header), planner, replica)
    return decode(header, array)


def confirm(is_planner: bool, planner: int, replica: ProcessGroup | None) -> None:
    """Wait until the rank that plans has ended the step; RuntimeError if it could not end it.

    Collective over the replica. It costs no extra waiting: the ranks would wait for the next plan
    at this point anyway.
    """
    header = ENDED.clone() if is_planner else None
    array_length(broadcast_integers(header, HEADER, planner, replica))


@contextmanager
def failing_together(planner: int, replica: ProcessGroup | None) -> Iterator[None]:
    """Turn an error of the rank that plans into an error on all ranks of its replica.

    The other ranks wait in ``share_plan`` or ``confirm``, where they raise RuntimeError.
    """
    try:
        yield
    except BaseException:
        if replica is not None:
            broadcast_integers(FAILURE.clone(), HEADER, planner, replica)
        raise
