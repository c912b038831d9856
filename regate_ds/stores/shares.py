"""Cut a job's batches into the shards of a store, and share these over the ranks.

Shards depend on the data alone; only the choice of the rank that computes one depends on the number
of ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, TypeVar, cast

_Batches = TypeVar("_Batches", bound=Sequence[Any])

LARGEST_SHARD = 16
"""Largest number of batches in a shard, which is what a killed job loses on each rank."""

FEWEST_SHARDS = 64
"""Smallest number of shards if there are as many batches, so that all ranks get an equal part."""


def into_shards(batches: _Batches) -> list[_Batches]:
    """Return the batches of each shard, in order, as parts of what is given."""
    size = max(1, min(LARGEST_SHARD, len(batches) // FEWEST_SHARDS))
    starts = range(0, len(batches), size)
    return [cast(_Batches, batches[start : start + size]) for start in starts]


def share_out(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Share items out over parts of about equal cost; return the item numbers of each part, sorted.

    The most expensive items go first, each to the cheapest part so far. No part exceeds an equal
    share by more than one item's cost.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, part = heapq.heappop(loads)
        parts[part].append(number)
        heapq.heappush(loads, (load + costs[number], part))
    return [sorted(part) for part in parts]
