"""Random layerwise token dropping (Yao et al., arXiv 2211.11586): each gated layer draws anew.

In each gated layer another random set of a sample's tokens is kept, prompt, images and answers
alike; the others pass that layer by and rejoin in order behind it. The loss runs on all labels.

Shapes: B rows, T positions, S samples, P positions of the micro-batch.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import TokenBatch, starts_segment
from regate_ds.algorithm.draw import generator
from regate_ds.algorithm.executions.execution import Ranked, Span
from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.plan import ElisionPlan, plan_rows, with_all_labels
from regate_ds.algorithm.quotas.quota import share_of
from regate_ds.algorithm.rows import RowLayout
from regate_ds.algorithm.select import kept_positions


@dataclass(frozen=True, kw_only=True)
class RandomLtd:
    """Keep the first of a sample's n tokens, and others at random, ceil(keep_share * n) in all."""

    seed: int = 0
    """Of the draws, which depend on seed, step, sample and layer alone."""

    def __post_init__(self) -> None:
        refuse_knobs(self)

    @property
    def chooses(self) -> bool:
        return True

    def spans(self, first_layer: int, last_layer: int) -> tuple[Span, ...]:
        layers = range(first_layer, last_layer)
        return tuple(Span(first=n, last=n + 1, kept_set=n - first_layer) for n in layers)

    def plan(self, batch: TokenBatch, ranked: Ranked, rows: RowLayout) -> ElisionPlan:
        """Return a plan with a kept set for each of ``ranked.layers``."""
        sets = tuple(self._set(batch, ranked, layer, rows) for layer in ranked.layers)
        assert sets, "random_ltd needs the gated layers, by number"
        return replace(with_all_labels(sets[0], batch), sets=sets)

    def _set(self, batch: TokenBatch, ranked: Ranked, layer: int, rows: RowLayout) -> ElisionPlan:
        sample_P = batch.sample_BT.reshape(-1)
        num_S = torch.bincount(sample_P[sample_P >= 0], minlength=len(batch.flat_keys))
        keep_P = starts_segment(batch.segment_BT).reshape(-1)
        first_S = keep_P.nonzero().squeeze(1)
        num_kept_S = share_of(num_S, ranked.keep_share)
        for key, first, num, num_kept in zip(
            batch.flat_keys, first_S.tolist(), num_S.tolist(), num_kept_S.tolist(), strict=True
        ):
            drawn = generator(self.seed, ranked.step, key, layer=layer)
            others: Tensor = torch.randperm(num - 1, generator=drawn)[: num_kept - 1]
            keep_P[first + 1 + others] = True
        kept_BK = kept_positions(keep_P.view_as(batch.segment_BT), rows.multiple)
        return plan_rows(batch, kept_BK)
