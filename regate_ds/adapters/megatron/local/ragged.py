"""Kept rows of a micro-batch, one sample behind the other: where they lie, and their bounds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from regate_ds.adapters.megatron.local.place import Place
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.parallel.resharding import SequenceCut


@dataclass(frozen=True)
class Packing:
    """Bounds of the samples in a ragged micro-batch.

    A sample includes its padding for context ranks; padding at the end counts as one more sample.
    """

    cumulative: Tensor
    """int32: where each sample starts, then the end of the last one."""

    longest: int
    """Length of the longest sample."""

    held_S: Tensor
    """int64: which rows of the whole sequence this context rank holds."""

    def to(self, device: torch.device | str) -> Packing:
        return Packing(self.cumulative.to(device), self.longest, self.held_S.to(device))


@dataclass(frozen=True)
class Ragged:
    """How a micro-batch's samples lie one after the other."""

    lengths: list[int]
    """Rows of each sample, with padding so that context ranks can divide it; then other padding."""

    kept: Tensor
    """Rows of each sample that hold a kept token."""

    index_R: Tensor
    """Index of each real slot in the whole sequence of rows."""


def lay_out(plan: ElisionPlan, place: Place) -> Ragged:
    """Lay the kept slots of a micro-batch's samples one after the other."""
    kept = plan.sample_lengths
    lengths = place.rows.ragged_lengths(kept)
    padding = torch.tensor(lengths[: len(kept)], dtype=torch.long) - kept
    padding_before = padding.cumsum(0) - padding
    index_R = torch.arange(plan.num_kept) + padding_before.repeat_interleave(kept)
    return Ragged(lengths, kept, index_R)


def packing_of(ragged: Ragged, place: Place) -> Packing:
    cumulative = torch.tensor([0, *accumulate(ragged.lengths)], dtype=torch.int32)
    held = SequenceCut(place.context_size).held(*ragged.lengths)
    return Packing(cumulative, max(ragged.lengths), held[place.context_rank])
