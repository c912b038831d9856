"""A rank's place among the ranks that share a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from regate_ds.algorithm.batch import TokenBatch, starts_segment
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.algorithm.rows import RowLayout
from regate_ds.parallel.resharding import SequenceCut


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a rank must know about its place to find its share of a plan."""

    context_size: int = 1
    context_rank: int = 0
    sequence_size: int = 1
    """Tensor-parallel size under sequence parallelism, else 1."""

    sequence_rank: int = 0
    ragged: bool = False
    """Whether the row format is ragged: kept rows of a micro-batch lie one after the other."""

    ends_early: bool = False
    """Whether the gated range ends before the last layer, so full sequences leave the decoder."""

    token_multiple: int = 1
    """What the user wants the number of kept rows to be a multiple of."""

    row_multiple: int = 1
    """What the number of kept rows of each rank must be a multiple of: 16 for most kinds of fp8."""

    @property
    def cut(self) -> SequenceCut:
        """Return how a sequence is divided over the ranks that share it."""
        return SequenceCut(self.context_size, self.sequence_size)

    @property
    def rows(self) -> RowLayout:
        """Return how kept rows must lie, so that the ranks can divide them."""
        row_format = "ragged" if self.ragged else "padded"
        return self.cut.row_layout(row_format, self.token_multiple, self.row_multiple)

    @property
    def rank(self) -> int:
        """Return this rank's number among the ranks that share a sequence."""
        return self.context_rank * self.sequence_size + self.sequence_rank


def require_cut(window: Sequence[TokenBatch], place: Place) -> None:
    """Refuse rows that the ranks cannot divide, or whose samples would be mixed: ValueError."""
    for batch in window:
        place.cut.owners(batch.labels_BT.shape[1])
        num_samples = max((len(row) for row in batch.keys), default=0)
        if num_samples <= 1:
            continue
        if not place.ragged:
            raise ValueError(
                f"a row holds {num_samples} samples, which padded rows cannot keep apart; attach "
                "with row_format='ragged', or give one sample a row"
            )
        _require_filled(batch, place)


def _require_filled(batch: TokenBatch, place: Place) -> None:
    """Refuse samples of a packed row that context ranks cannot cut, each by itself."""
    multiple = place.cut.zigzag
    starts_T = starts_segment(batch.segment_BT).flatten().nonzero().flatten()
    for key, start in zip(batch.flat_keys, starts_T.tolist(), strict=True):
        if start % multiple:
            raise ValueError(
                f"sample {key} starts at position {start} of a packed row, but {place.context_size}"
                f" context ranks cut each sample in {multiple}; fill each up to a multiple of "
                f"{multiple} (segment -1), and give its place in cu_seqlens_q_padded"
            )


def cut_lengths(plan: ElisionPlan, place: Place) -> tuple[int, ...]:
    """Return the lengths of what context ranks cut of a row before the gate, each by itself.

    A packed row has its samples, each filled up, and then what is left of it.
    """
    multiple = place.cut.zigzag
    if multiple == 1 or not plan.is_packed:
        return (plan.num_tokens,)
    starts, runs = plan.sample_starts.tolist(), plan.token_run_lengths
    (last,) = (run for at, run in zip(accumulate(runs, initial=0), runs) if at == starts[-1])
    end = starts[-1] + math.ceil(last / multiple) * multiple
    bounds = sorted({*starts, end, plan.num_tokens})
    return tuple(b - a for a, b in pairwise(bounds))
