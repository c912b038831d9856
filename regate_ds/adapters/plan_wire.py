"""Send the plan of a step to every rank of a replica, as integers: one header and one array.

Pipeline stages must agree on all shapes before the schedule starts, because a collective inside the
schedule would wait for a rank that waits for its neighbour. So the rank that plans broadcasts the
plans of all micro-batches at once.

Header: status, length of the array, number of micro-batches, optimizer step, its kind, targets
over all data ranks, and the step's counts by the names of COUNTS.
Array: first T, B, K, L, number filled, the number of runs of one sample or of padding (0 where rows
are not packed), whether rows are moved and weighed, and in a merged step the size of a patch and
the positions of a row (else 0, 0), for each micro-batch; then, for each again, the lengths of these
runs, kept positions (where rows are moved), segments, the slots of the targets, the targets, the
bits of their weights (where they have any), and in a merged step the first position and the number
of positions of each slot, and the positions of the targets.
Shapes: T positions of a row, B rows, K slots of a row, L targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.algorithm.counts import COUNTS
from regate_ds.algorithm.plan import ElisionPlan, Slots, StepPlan, assemble_plan
from regate_ds.parallel.collectives import broadcast_integers

HEADER = 6 + len(COUNTS)
"""Number of integers in a header."""

_SHAPE = 10
"""Number of integers that say what follows for a micro-batch."""

_DONE, _FAILED = 0, 1

Found = TypeVar("Found")


@dataclass(frozen=True)
class Replica:
    """The ranks that hold one copy of the model; one of them plans for all."""

    planner: int
    """The rank, of the world, that plans."""

    group: ProcessGroup | None
    """These ranks, on a backend for CPU memory; None if there is one."""

    def share(self, make: Callable[[], StepPlan] | None) -> StepPlan:
        """Return the step's plan on every rank; ``make`` makes it, on the rank that plans.

        Collective over the replica: an error of ``make`` is a RuntimeError on all other ranks.
        """
        header, array = None, None
        if make is not None:
            header, array = self._call(lambda: encode(make()))
        header = broadcast_integers(header, HEADER, self.planner, self.group, torch.int64)
        array = broadcast_integers(array, array_length(header), self.planner, self.group)
        return decode(header, array)

    def ask(self, is_so: Callable[[], bool] | None) -> bool:
        """Return on every rank what ``is_so`` returns, on the rank that plans.

        Collective over the replica: an error of ``is_so`` is a RuntimeError on all other ranks.
        """
        header = None
        if is_so is not None:
            header = torch.zeros(HEADER, dtype=torch.int64)
            header[1] = self._call(is_so)
        header = broadcast_integers(header, HEADER, self.planner, self.group, torch.int64)
        return bool(array_length(header))

    def confirm(self, call: Callable[[], None] | None) -> None:
        """Wait until the rank that plans has done ``call``: the end of a step, a save, a load.

        Collective over the replica: an error of ``call`` is a RuntimeError on all other ranks.
        """
        header = None
        if call is not None:
            self._call(call)
            header = torch.zeros(HEADER, dtype=torch.int64)
        array_length(broadcast_integers(header, HEADER, self.planner, self.group, torch.int64))

    def _call(self, call: Callable[[], Found]) -> Found:
        """Call on the rank that plans; where it fails, no other rank waits for what comes."""
        try:
            return call()
        except BaseException:
            if self.group is not None:
                failure = torch.full((HEADER,), _FAILED, dtype=torch.int64)
                broadcast_integers(failure, HEADER, self.planner, self.group, torch.int64)
            raise


def encode(plan: StepPlan) -> tuple[Tensor, Tensor]:
    """Return header (int64) and array (int32) of a step's plan."""
    parts = [torch.tensor([_shape(micro) for micro in plan.micro]).reshape(-1)]
    for micro in plan.micro:
        parts += [x.reshape(-1) for x in _tensors(micro)]
    array = torch.cat(parts).to(torch.int32)
    counts = [plan.counts.get(name, 0) for name in COUNTS]
    kind = int(plan.is_dense) + 2 * int(plan.is_merged)
    about = [plan.step, kind, plan.num_targets_global]
    header = [_DONE, len(array), len(plan.micro), *about, *counts]
    return torch.tensor(header, dtype=torch.int64), array


def _shape(plan: ElisionPlan) -> list[int]:
    num_runs = len(plan.token_run_lengths) if plan.is_packed else 0
    flags = (num_runs, plan.moves_rows, plan.weight_L is not None)
    sizes = (*plan.kept_BK.shape, plan.num_targets, plan.num_filled)
    merged = (0, 0) if plan.patches is None else (plan.patches.size, plan.patches.row_length)
    return [plan.num_tokens, *sizes, *map(int, flags), *merged]


def _tensors(plan: ElisionPlan) -> Iterator[Tensor]:
    if plan.is_packed:
        yield torch.tensor(plan.token_run_lengths)
    if plan.moves_rows:
        yield plan.kept_BK
    yield from (plan.segment_BK, plan.label_slot_L, plan.targets_L)
    if plan.weight_L is not None:
        yield plan.weight_L.float().view(torch.int32).long()
    if plan.patches is not None:
        yield plan.patches.member_SM[:, 0]
        yield plan.patches.is_member_SM.sum(dim=1)
        yield plan.label_position_L


def array_length(header: Tensor) -> int:
    """Return the length of the array that follows; RuntimeError if the rank that plans failed."""
    status, length, *_ = header.tolist()
    if status == _FAILED:
        raise RuntimeError(
            "the rank that plans for this one, on the last pipeline stage, has failed; read that "
            "rank's own error, which says why"
        )
    return length


def decode(header: Tensor, array: Tensor) -> StepPlan:
    """Rebuild the plan from what ``encode`` returned."""
    _, _, num_micro, step, kind, num_targets, *counts = header.tolist()
    shapes = array[: _SHAPE * num_micro].reshape(-1, _SHAPE).tolist()
    values = _Reader(array[_SHAPE * num_micro :].long())
    micro = [
        replace(_decoded(shape, values), step=step, micro=number)
        for number, shape in enumerate(shapes)
    ]
    named = dict(zip(COUNTS, counts, strict=True))
    is_dense, is_merged = bool(kind & 1), bool(kind & 2)
    return StepPlan(step, is_dense, tuple(micro), num_targets, named, is_merged=is_merged)


class _Reader:
    """Takes the next values of the array."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._start = values, 0

    def take(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        self._start += size
        return self._values[self._start - size : self._start].view(shape)


def _decoded(shape: list[int], values: _Reader) -> ElisionPlan:
    num_tokens, num_rows, num_slots, num_targets, num_filled, num_runs, *flags = shape
    moves_rows, is_weighed, size, row_length = flags
    run_lengths = tuple(values.take(num_runs).tolist())
    kept_BK = torch.arange(num_slots).expand(num_rows, -1)
    if moves_rows:
        kept_BK = values.take(num_rows, num_slots)
    segment_BK = values.take(num_rows, num_slots)
    slots = Slots(kept_BK, segment_BK, values.take(num_targets), values.take(num_targets))
    plan = assemble_plan(
        slots,
        num_tokens=num_tokens,
        moves_rows=bool(moves_rows),
        is_packed=num_runs > 0,
        token_run_lengths=run_lengths,
    )
    weight_L = values.take(num_targets).to(torch.int32).view(torch.float32) if is_weighed else None
    plan = replace(plan, weight_L=weight_L, num_filled=num_filled)
    return _with_patches(plan, values, size, row_length) if size else plan


def _with_patches(plan: ElisionPlan, values: _Reader, size: int, row_length: int) -> ElisionPlan:
    # Here, so that a run without merged steps does not load it.
    from regate_ds.algorithm.executions.merge import with_patches

    num_slots = plan.segment_BK.numel()
    first_S, num_S = values.take(num_slots), values.take(num_slots)
    nth_M = torch.arange(size)
    is_member_SM = nth_M < num_S[:, None]
    member_SM = (first_S[:, None] + nth_M).masked_fill(~is_member_SM, 0)
    position_L = values.take(plan.num_targets)
    return with_patches(plan, member_SM, is_member_SM, position_L, row_length=row_length)
