"""Cut samples into the teacher's batches and the store's shards, and share these over the ranks.

Batches and shards depend on the data and the token limit alone; only the choice of the rank that
scores a shard depends on the number of ranks. Shapes: R rows of the answer index.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor

LARGEST_SHARD = 16
"""Largest number of batches in a shard, which is what a killed job loses on each rank."""

FEWEST_SHARDS = 64
"""Smallest number of shards if there are as many batches, so that all ranks get an equal part."""

RowBatch = list[int]
"""Rows of the answer index that the teacher reads in one forward pass."""


def by_length(rows_R: Tensor, num_positions: Tensor) -> list[int]:
    """Sort rows from long to short, so that a batch too large for the device fails at once."""
    return rows_R[num_positions[rows_R].argsort(descending=True, stable=True)].tolist()


def cut_batches(
    rows: Sequence[int], num_positions: Tensor, tokens_per_batch: int
) -> list[RowBatch]:
    """Cut rows, sorted from long to short, into batches of at most ``tokens_per_batch`` padded
    tokens. A longer row is a batch of its own."""
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
    """Cut rows, int64 [R], into shards of whole batches. ``cut_batches`` of a shard's rows returns
    the same batches."""
    batches = cut_batches(by_length(rows_R, num_positions), num_positions, tokens_per_batch)
    size = max(1, min(LARGEST_SHARD, len(batches) // FEWEST_SHARDS))
    parts = [batches[start : start + size] for start in range(0, len(batches), size)]
    return [[row for batch in part for row in batch] for part in parts]


def padded_tokens(batches: list[RowBatch], num_positions: Tensor) -> int:
    """Count the tokens of a forward pass over each of the batches, padding included."""
    return sum(len(batch) * int(num_positions[batch].max()) for batch in batches)


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
