"""The plan of a global batch as integers: one header and one array for every rank of a replica.

Pipeline stages must agree on all shapes before the schedule starts, as a collective inside it would
wait for a rank that waits for a neighbour. So the rank that plans tells all others at once.

Header: status, optimizer step, dense or not, number of micro-batches, length of the array.
Array: for each micro-batch T, B, K and whether rows hold several samples; then kept positions (not
in a dense step), segments and labels of all slots.
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
_PLANNED, _FAILED = 0, 1


@dataclass(frozen=True)
class Sent:
    """What arrives: the decision for one optimizer step."""

    step: int
    is_dense: bool
    micro: tuple[ElisionPlan, ...]


ENDED = torch.tensor([_PLANNED, 0, 0, 0, 0], dtype=torch.int32)
"""Sent when the rank that plans has ended a step."""

FAILURE = torch.tensor([_FAILED, 0, 0, 0, 0], dtype=torch.int32)
"""Sent in place of a header by a rank that could not plan, so that no rank waits for the array."""


def encode(step: int, is_dense: bool, micro: Sequence[ElisionPlan]) -> tuple[Tensor, Tensor]:
    """Header and array, int32."""
    shapes = [[p.num_tokens, *p.kept_BK.shape, int(p.is_packed)] for p in micro]
    parts = [torch.tensor(shapes).reshape(-1)]
    for plan in micro:
        tensors = (plan.segment_BK, plan.labels_BK)
        parts += [x.reshape(-1) for x in (tensors if is_dense else (plan.kept_BK, *tensors))]
    array = torch.cat(parts).to(torch.int32)
    header = [_PLANNED, step, int(is_dense), len(micro), len(array)]
    return torch.tensor(header, dtype=torch.int32), array


def array_length(header: Tensor) -> int:
    """How much follows; RuntimeError if the rank that plans has failed."""
    status, *_, length = header.tolist()
    if status == _FAILED:
        raise RuntimeError("the rank that plans for this one has failed; its own error says why")
    return length


def decode(header: Tensor, array: Tensor) -> Sent:
    _, step, dense, num_micro, _ = header.tolist()
    shapes = array[: 4 * num_micro].reshape(-1, 4).tolist()
    values = array[4 * num_micro :].long()
    micro, at = [], 0
    for number, (num_tokens, num_rows, num_slots, is_packed) in enumerate(shapes):
        size = num_rows * num_slots
        taken = values[at : at + (2 if dense else 3) * size].view(-1, num_rows, num_slots)
        at += taken.numel()
        kept_BK = torch.arange(num_slots).expand(num_rows, -1) if dense else taken[0]
        plan = assemble_plan(
            Slots(kept_BK, taken[-2], taken[-1]),
            num_tokens=num_tokens,
            is_dense=bool(dense),
            is_packed=bool(is_packed),
        )
        micro.append(replace(plan, step=step, micro=number))
    return Sent(step, bool(dense), tuple(micro))


def share_plan(plan: StepPlan | Sent | None, planner: int, replica: ProcessGroup | None) -> Sent:
    """Give every rank of the replica the plan of the rank ``planner`` of the world.

    Collective over the replica; a RuntimeError on all other ranks where that one could not plan.
    """
    header, array = None, None
    if plan is not None:
        header, array = encode(plan.step, plan.is_dense, plan.micro)
    header = broadcast_integers(header, HEADER, planner, replica)
    array = broadcast_integers(array, array_length(header), planner, replica)
    return decode(header, array)


def confirm(is_planner: bool, planner: int, replica: ProcessGroup | None) -> None:
    """End a step together: a RuntimeError where the rank that plans could not end it.

    Collective over the replica; the ranks would wait for the next plan at this point anyway.
    """
    header = ENDED.clone() if is_planner else None
    array_length(broadcast_integers(header, HEADER, planner, replica))


@contextmanager
def failing_together(planner: int, replica: ProcessGroup | None) -> Iterator[None]:
    """An error where the plan is made is an error on all ranks of its replica, which wait in
    ``share`` or ``confirm``."""
    try:
        yield
    except BaseException:
        if replica is not None:
            broadcast_integers(FAILURE.clone(), HEADER, planner, replica)
        raise
