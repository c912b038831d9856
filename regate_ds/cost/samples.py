"""Samples and micro-batches in numbers: what decides their cost before they are read.

The FLOPs of a sample are those of a row of its own: padding depends on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regate_ds.algorithm.executions.execution import Span
from regate_ds.cost.flops import RowCounts, rows_flops, tower_flops
from regate_ds.cost.shape import ModelShape


@dataclass(frozen=True)
class SampleSize:
    """One sample."""

    tokens: int
    answers: int
    """Label positions."""

    images: tuple[int, ...]
    """Image tokens of each image."""

    def kept(self, answer_share: float, image_share: float) -> int:
        """Return how many of its positions a sparse step keeps."""
        image = sum(self.images)
        kept = sum(math.ceil(image_share * n - 1e-9) for n in self.images)
        return self.tokens - self.answers - image + kept + self.targets(answer_share)

    def targets(self, answer_share: float) -> int:
        return math.ceil(answer_share * self.answers - 1e-9)


def rows_of_micro(
    samples: Sequence[SampleSize], shares: tuple[float, float] | None, pack_length: int | None
) -> RowCounts:
    """Return a micro-batch in numbers; shares: of answers and images; None is a dense step."""
    lengths = [one.tokens for one in samples]
    kept = lengths if shares is None else [one.kept(*shares) for one in samples]
    share = 1.0 if shares is None else shares[0]
    targets = sum(one.targets(share) for one in samples)
    if pack_length is None:
        count, length, slots = len(samples), float(max(lengths)), float(max(kept))
    else:
        count = max(1, math.ceil(sum(lengths) / pack_length))
        length, slots = sum(lengths) / count, sum(kept) / count
    return RowCounts(count=count, length=length, slots=slots, kept=sum(kept), num_targets=targets)


def sample_flops(
    shape: ModelShape,
    sample: SampleSize,
    shares: tuple[float, float] | None = None,
    spans: Sequence[Span] = (),
) -> float:
    """Return the FLOPs of one sample in a step, its images in the tower included.

    shares: what the step keeps of answers and of images; None is a dense step.
    """
    found = rows_flops(shape, rows_of_micro([sample], shares, None), spans)
    return found if shape.tower is None else found + tower_flops(shape.tower, sample.images)
