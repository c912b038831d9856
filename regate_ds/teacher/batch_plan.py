"""What the teacher reads together, what one file of the store holds, and who scores it.

Batches and shards follow from the data and the token budget alone; only who scores a shard follows
from the ranks that there are.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor

LARGEST_SHARD = 16
"""Batches of a shard, at most: what a killed job loses on each rank."""

FEWEST_SHARDS = 64
"""Shards of a job that has as many batches, so that they spread evenly over the ranks."""

Batch = list[int]
"""Rows of the answer index that the teacher reads in one forward pass."""


def plan_batches(num_positions: Tensor, tokens_per_batch: int) -> list[Batch]:
    """Rows of similar length together, so that each batch has at most that many padded tokens.

    A row that is longer than the budget is a batch of its own. The longest come first: a batch
    that the device cannot hold should fail at once.
    """
    lengths = num_positions.tolist()
    batches: list[Batch] = []
    for row in num_positions.argsort(descending=True, stable=True).tolist():
        # Rows come by length, so a batch is as wide as its first row.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def plan_shards(batches: list[Batch]) -> list[list[Batch]]:
    """Cut the batches into shards: a function of the batches alone, whatever ranks there are."""
    size = max(1, min(LARGEST_SHARD, len(batches) // FEWEST_SHARDS))
    return [batches[start : start + size] for start in range(0, len(batches), size)]


def padded_tokens(batches: list[Batch], num_positions: Tensor) -> int:
    """What a forward pass over each of the batches costs, padding included."""
    return sum(len(batch) * int(num_positions[batch].max()) for batch in batches)


def share_out(costs: Sequence[int], num_parts: int) -> list[list[int]]:
    """Numbers of the costs for each part, in order: the dearest first, each to the part with the
    least so far. No part exceeds an equal share by more than one of the costs."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, part = heapq.heappop(loads)
        parts[part].append(number)
        heapq.heappush(loads, (load + costs[number], part))
    return [sorted(part) for part in parts]
