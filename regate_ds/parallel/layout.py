"""The groups of ranks that a run has. ``None`` means that the axis is not in use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """The axes that the method knows. An adapter makes a layout; everything below receives it."""

    data: ProcessGroup | None = None
    """Ranks that see different samples."""

    device: torch.device | str = "cpu"
    """Where the backend of these groups wants its tensors."""

    replica: ProcessGroup | None = None
    """Ranks that hold one copy of the model together (tensor, context and pipeline axes)."""


def rank_in(group: ProcessGroup | None) -> int:
    """Return this process's rank in the group; 0 where the axis is not in use."""
    return 0 if group is None else dist.get_rank(group)


def is_first(group: ProcessGroup | None) -> bool:
    """Return whether this rank is the group's first: the one that writes what all share."""
    return rank_in(group) == 0


def size_of(group: ProcessGroup | None) -> int:
    """Return the number of ranks in the group; 1 where the axis is not in use."""
    return 1 if group is None else dist.get_world_size(group)


def num_ranks() -> int:
    """Return the number of ranks of the job; before they have joined, as WORLD_SIZE says."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_group(group: ProcessGroup | None, call: str) -> None:
    """Refuse, by ValueError, a job of several ranks without a group: each would do all the work."""
    if group is None and num_ranks() > 1:
        raise ValueError(
            f"this job has {num_ranks()} ranks: give {call} the group of those that call "
            "it, such as group=torch.distributed.group.WORLD, after init_process_group"
        )


def cpu_group(groups: Sequence[Sequence[int]]) -> ProcessGroup | None:
    """Make these groups of ranks for tensors in CPU memory, and return the one with this rank.

    ``None`` if the rank is alone in it. Collective over the world: every rank makes every group, in
    the same order.
    """
    # Torch's fake backend, for dry runs, has no groups of another backend.
    return own_group(groups, None if dist.get_backend() == "fake" else "gloo")


def own_group(groups: Sequence[Sequence[int]], backend: str | None = None) -> ProcessGroup | None:
    """Make these groups of ranks, and return the one with this rank; ``None`` if it is alone in it.

    Collective over the world, as ``cpu_group`` is. backend: ``None`` is that of the world.
    """
    with_this_rank: Any = None
    for ranks in groups:
        group = dist.new_group(list(ranks), backend=backend) if len(ranks) > 1 else None
        with_this_rank = group if dist.get_rank() in ranks else with_this_rank
    return with_this_rank


def replicas(data_rank_of: list[int]) -> list[list[int]]:
    """Return the ranks of each replica, in the order of the replicas' data ranks.

    data_rank_of: the data rank of each rank of the world; ranks that share one form a replica.
    """
    ranks_of: dict[int, list[int]] = {}
    for rank, data_rank in enumerate(data_rank_of):
        ranks_of.setdefault(data_rank, []).append(rank)
    return [ranks_of[data_rank] for data_rank in sorted(ranks_of)]


def layout_of_replicas(ranks_per_replica: int) -> ParallelLayout:
    """Cut the world into replicas of ``ranks_per_replica`` consecutive ranks each.

    Ranks at the same place in their replicas form a data group. Collective over the world, on its
    backend. ValueError if the ranks cannot be cut so.
    """
    world = dist.get_world_size()
    if world % ranks_per_replica:
        raise ValueError(
            f"{world} ranks cannot be cut into replicas of {ranks_per_replica}; start a multiple "
            f"of {ranks_per_replica} ranks"
        )
    ranks = range(world)
    replica = own_group([ranks[r : r + ranks_per_replica] for r in ranks[::ranks_per_replica]])
    data = own_group([ranks[place::ranks_per_replica] for place in range(ranks_per_replica)])
    return ParallelLayout(data=data, replica=replica)
