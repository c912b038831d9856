"""Find Megatron's process groups of a run, and make the group that plans are sent over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.fp4_utils import get_fp4_align_size
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from regate_ds.adapters.megatron.local.place import Place
from regate_ds.adapters.plan_wire import Replica
from regate_ds.parallel.collectives import gather_integers
from regate_ds.parallel.layout import cpu_group, replicas


@dataclass(frozen=True, kw_only=True)
class Axes:
    """One rank's groups; a group is ``None`` if its axis is not in use."""

    place: Place
    split: ProcessGroup | None
    """Ranks that hold parts of one sequence."""

    sequence: ProcessGroup | None
    """Tensor ranks, under sequence parallelism only."""

    context: ProcessGroup | None
    """Ranks that hold parts of one sequence under context parallelism."""

    data: ProcessGroup | None
    """Ranks at the same place of other replicas, which see other samples."""

    replica: Replica
    """All ranks of one copy of the model; the first tensor and context rank of the last stage
    plans."""

    pipeline_size: int
    virtual_size: int


Table = list[tuple[int, bool]]
"""Each rank's data rank, and whether it plans for its replica, by rank of the world."""


def find_axes(
    config: Any, *, ragged: bool, ends_early: bool, token_multiple: int, table: Table | None = None
) -> Axes:
    """Read Megatron's groups and make the replica's group. Collective over the world.

    token_multiple: what the user wants the number of kept rows to be a multiple of.
    table: what ``rank_table`` would return, if the caller knows it already.
    """
    sequence_parallel = config.sequence_parallel and config.tensor_model_parallel_size > 1
    context_size = mpu.get_context_parallel_world_size()
    place = Place(
        context_size=context_size,
        context_rank=mpu.get_context_parallel_rank(),
        sequence_size=config.tensor_model_parallel_size if sequence_parallel else 1,
        sequence_rank=mpu.get_tensor_model_parallel_rank() if sequence_parallel else 0,
        ragged=ragged,
        ends_early=ends_early,
        token_multiple=token_multiple,
        row_multiple=row_multiple(config),
    )
    return Axes(
        place=place,
        split=_split_group(place),
        sequence=mpu.get_tensor_model_parallel_group() if sequence_parallel else None,
        context=mpu.get_context_parallel_group() if context_size > 1 else None,
        data=mpu.get_data_parallel_group() if mpu.get_data_parallel_world_size() > 1 else None,
        replica=_replica(table or rank_table()),
        pipeline_size=mpu.get_pipeline_model_parallel_world_size(),
        virtual_size=mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def row_multiple(config: Any) -> int:
    """Return the number that a rank's rows must be a multiple of, for the kernels of fp8 or fp4."""
    fp8, fp4 = getattr(config, "fp8", None), getattr(config, "fp4", None)
    if fp4:
        return get_fp4_align_size(config.fp4_recipe)
    return get_fp8_align_size(config.fp8_recipe) if fp8 else 1


def _split_group(place: Place) -> ProcessGroup | None:
    """Return the ranks that hold parts of one sequence; None if one rank holds all of it."""
    if place.cut.size == 1:
        return None
    if place.sequence_size == 1:
        return mpu.get_context_parallel_group()
    group = mpu.get_tensor_and_context_parallel_group()
    if dist.get_rank(group) != place.rank:
        raise ValueError(
            f"this rank is number {dist.get_rank(group)} of its tensor and context group, not "
            f"{place.rank}: this order of parallel dimensions is not supported; use tp-cp-..."
        )
    return group


def rank_table() -> Table:
    """Ask every rank for its data rank and whether it plans. Collective over the world."""
    is_planner = (
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_context_parallel_rank() == 0
    )
    data_ranks = gather_integers(mpu.get_data_parallel_rank(), group_device())
    plans = gather_integers(int(is_planner), group_device())
    return list(zip(data_ranks, map(bool, plans), strict=True))


def group_device() -> torch.device:
    """Return the device on which the backend of Megatron's groups wants its tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _replica(table: Table) -> Replica:
    """Return this rank's replica, and which of its ranks plans."""
    groups = replicas([data_rank for data_rank, _ in table])
    replica_ranks = next(ranks for ranks in groups if dist.get_rank() in ranks)
    return Replica(next(rank for rank in replica_ranks if table[rank][1]), cpu_group(groups))


def schedule_groups() -> ProcessGroupCollection:
    """Return the groups that Megatron's schedules look up if they get no communicator."""
    groups = ProcessGroupCollection()
    groups.tp = mpu.get_tensor_model_parallel_group()
    groups.cp = mpu.get_context_parallel_group()
    groups.pp = mpu.get_pipeline_model_parallel_group()
    groups.embd = mpu.get_embedding_group(check_initialized=False)
    groups.pos_embd = mpu.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = mpu.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=False
    )
    return groups
