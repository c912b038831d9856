"""Divide the samples of a global batch over ranks and micro-batches by their predicted cost.

What is in a global batch is decided before, and is the same on any number of ranks. Every rank
computes the same division, and all have equally many micro-batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from regate_ds.cost.pipeline import smooth_order

Division = list[list[list[int]]]
"""By rank and micro-batch: places of samples in the global batch."""


def divide(  # noqa: PLR0913 (a division and its bounds)
    costs: Sequence[float],
    num_ranks: int,
    num_micro: int,
    *,
    tokens: Sequence[int] | None = None,
    max_tokens: int | None = None,
    equal: bool = False,
) -> Division:
    """Give each rank samples of about equal cost, in ``num_micro`` micro-batches.

    costs: of each sample of the global batch.
    tokens: the length of each sample; with ``max_tokens`` no micro-batch is larger than that, the
        padding of its rows to the longest included.
    equal: every micro-batch has equally many samples, as hosts with rows of one shape need it.

    ValueError if there are fewer samples than micro-batches, if they cannot be divided equally, or
    if the budget is too small for so many micro-batches.
    """
    num = len(costs)
    if num < num_ranks * num_micro:
        raise ValueError(
            f"{num} samples are fewer than {num_ranks} ranks with {num_micro} micro-batches each; "
            "make the global batch larger"
        )
    if equal and num % (num_ranks * num_micro):
        raise ValueError(
            f"{num} samples cannot be divided equally over {num_ranks} ranks with {num_micro} "
            "micro-batches each; make the global batch a multiple of these"
        )
    most = num // num_ranks if equal else num
    by_rank = _spread(range(num), costs, num_ranks, least=num_micro, most=most)
    if max_tokens is None or tokens is None:
        each = num // num_ranks // num_micro if equal else num
        division = [_spread(own, costs, num_micro, least=1, most=each) for own in by_rank]
    else:
        division = [_within(own, tokens, num_micro, max_tokens) for own in by_rank]
    return [_in_turn(micro, costs) for micro in division]


def micro_batches_needed(
    costs: Sequence[float], num_ranks: int, tokens: Sequence[int], max_tokens: int
) -> int:
    """Return the smallest number of micro-batches a rank in which a global batch fits the budget.

    ValueError if a sample alone is larger, or ranks would have too few samples.
    """
    if max(tokens) > max_tokens:
        raise ValueError(
            f"max_tokens={max_tokens}: a sample has {max(tokens)} tokens; set it to at least that"
        )
    for num_micro in range(1, len(costs) // num_ranks + 1):
        try:
            divide(costs, num_ranks, num_micro, tokens=tokens, max_tokens=max_tokens)
        except ValueError:
            continue
        return num_micro
    raise ValueError(
        f"max_tokens={max_tokens}: {len(costs)} samples do not fit on {num_ranks} ranks with a "
        "sample in each micro-batch; raise it, or make the global batch larger"
    )


def imbalance(costs: Sequence[float], division: Division) -> float:
    """Return the largest cost of a rank over the mean: how much longer all take than they could."""
    by_rank = [sum(costs[n] for micro in rank for n in micro) for rank in division]
    return max(by_rank) * len(by_rank) / sum(by_rank)


def _in_turn(micro: list[list[int]], costs: Sequence[float]) -> list[list[int]]:
    """Return a rank's micro-batches in the order that keeps a pipeline busy; ranks that wait for
    each other in every micro-batch thus have similar ones at the same time."""
    order = smooth_order([sum(costs[n] for n in each) for each in micro])
    return [micro[n] for n in order]


def _spread(
    samples: Sequence[int], costs: Sequence[float], num_bins: int, *, least: int, most: int
) -> list[list[int]]:
    """Put each sample, the dearest first, into the cheapest bin; bins keep their reading order.

    least, most: how many samples a bin has at least and at most.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, number) for number in range(num_bins)]
    missing = num_bins * least
    # Ties go to the earlier sample and the earlier bin, on every rank alike.
    order = sorted(samples, key=lambda n: (-costs[n], n))
    for done, sample in enumerate(order):
        must_fill = len(order) - done <= missing
        waiting = []
        while True:
            total, number = heapq.heappop(heap)
            if not must_fill or len(bins[number]) < least:
                break
            waiting.append((total, number))
        missing -= len(bins[number]) < least
        bins[number].append(sample)
        if len(bins[number]) < most:
            heapq.heappush(heap, (total + costs[sample], number))
        for entry in waiting:
            heapq.heappush(heap, entry)
    return [sorted(each) for each in bins]


def _within(
    samples: Sequence[int], tokens: Sequence[int], num_micro: int, max_tokens: int
) -> list[list[int]]:
    """Divide a rank's samples so that rows of a micro-batch are of similar length and fit."""
    bins: list[list[int]] = []
    for sample in sorted(samples, key=lambda n: (-tokens[n], n)):
        # The first of a bin is its longest, to which the others are padded.
        if not bins or (len(bins[-1]) + 1) * tokens[bins[-1][0]] > max_tokens:
            bins.append([])
        bins[-1].append(sample)
    too_long = any(tokens[each[0]] > max_tokens for each in bins)
    if too_long or len(bins) > num_micro or len(samples) < num_micro:
        raise ValueError(
            f"max_tokens={max_tokens}: {len(samples)} samples of a rank do not fit in {num_micro} "
            "micro-batches; raise it, or the number of micro-batches"
        )
    while len(bins) < num_micro:
        largest = max(bins, key=len)
        half = len(largest) // 2
        bins.remove(largest)
        bins += [largest[:half], largest[half:]]
    return [sorted(each) for each in sorted(bins)]
