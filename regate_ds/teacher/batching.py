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

RowBatch = list[int]
"""Rows of the answer index that the teacher reads in one forward pass."""


def by_length(rows_R: Tensor, num_positions: Tensor) -> list[int]:
    """Rows from long to short: a batch that the device cannot hold should fail at once."""
    return rows_R[num_positions[rows_R].argsort(descending=True, stable=True)].tolist()


def cut_batches(
    rows: Sequence[int], num_positions: Tensor, tokens_per_batch: int
) -> list[RowBatch]:
    """Rows, which come from long to short, one after the other into batches of at most that many
    padded tokens. A row that is longer than that is a batch of its own."""
    lengths = num_positions[rows].tolist()
    batches: list[RowBatch] = []
    widest = 0
    for row, length in zip(rows, lengths):
        # A batch is as wide as its first row.
        if batches and (len(batches[-1]) + 1) * widest <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
            widest = length
    return batches


def cut_shards(rows_R: Tensor, num_positions: Tensor, tokens_per_batch: int) -> list[list[int]]:
    """Cut rows, int64 [R], into shards of whole batches; to ``cut_batches`` a shard gives these
    batches again."""
    batches = cut_batches(by_length(rows_R, num_positions), num_positions, tokens_per_batch)
    size = max(1, min(LARGEST_SHARD, len(batches) // FEWEST_SHARDS))
    parts = [batches[start : start + size] for start in range(0, len(batches), size)]
    return [[row for batch in part for row in batch] for part in parts]


def padded_tokens(batches: list[RowBatch], num_positions: Tensor) -> int:
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
