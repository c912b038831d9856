"""Which groups of ranks a run has. ``None`` means that the axis is not in use."""

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
    """The axes that the method knows; an adapter makes it, everything below receives it."""

    data: ProcessGroup | None = None
    """Ranks that see different samples."""

    device: torch.device | str = "cpu"
    """Where the backend of these groups wants its tensors."""

    replica: ProcessGroup | None = None
    """Ranks that hold one copy of the model together (tensor, context and pipeline axes)."""


def rank_in(group: ProcessGroup | None) -> int:
    """This process's rank in the group; 0 where the axis is not in use."""
    return 0 if group is None else dist.get_rank(group)


def is_first(group: ProcessGroup | None) -> bool:
    """Return whether this rank is the group's first: the one that writes what all share."""
    return rank_in(group) == 0


def size_of(group: ProcessGroup | None) -> int:
    """Number of ranks in the group; 1 where the axis is not in use."""
    return 1 if group is None else dist.get_world_size(group)


def num_ranks() -> int:
    """Of the job, also before they know each other: then as the launcher has announced them."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def cpu_group(groups: Sequence[Sequence[int]]) -> ProcessGroup | None:
    """Of these groups of ranks the one with this rank, on a backend of CPU memory; ``None``
    if it is alone. Collective over the world: every rank makes every group, in the same order."""
    # Torch's fake backend, for dry runs, has no groups of another backend.
    return own_group(groups, None if dist.get_backend() == "fake" else "gloo")


def own_group(groups: Sequence[Sequence[int]], backend: str | None = None) -> ProcessGroup | None:
    """Of these groups of ranks the one with this rank; ``None`` if it is alone. Collective over the
    world, as ``cpu_group``. backend: ``None`` is the world's own."""
    own: Any = None
    for ranks in groups:
        made = dist.new_group(list(ranks), backend=backend) if len(ranks) > 1 else None
        own = made if dist.get_rank() in ranks else own
    return own


def replicas(data_rank_of: list[int]) -> list[list[int]]:
    """Ranks of the world that hold one copy of the model together, from each rank's data rank."""
    found: dict[int, list[int]] = {}
    for rank, data_rank in enumerate(data_rank_of):
        found.setdefault(data_rank, []).append(rank)
    return [found[data_rank] for data_rank in sorted(found)]


def layout_of_replicas(ranks_per_replica: int) -> ParallelLayout:
    """Cut the world into replicas of that many consecutive ranks; ranks of the same place in their
    replicas form a data group. Collective over the world, on its own backend."""
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
