"""Scores above a value that moves: the count of a step varies, its mean over the steps is p.

The value is ``mean + z * deviation`` of the step's scores over all data ranks, so that it follows
scores that fall or spread. ``z`` is moved after each sparse step by the share that was kept:

    z <- z + gain * (share - p)

so that the sum of (share - p) over the steps is (z - its first value) / gain: as long as z stays
within bounds, the mean share goes to p. Where p moves over the run z follows, and the mean share
goes to the mean of p; behind a jump of p it takes some steps.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regate_ds.algorithm.knobs import refuse_knobs
from regate_ds.algorithm.quotas.quota import Exchange, QuotaState, Samples, bits, numbers

QUANTILE_STATE = "z"

_UNIT = 1024
"""Scores are added up as whole multiples of 1 / 1024, so that no order of adding shows."""

_LARGEST = 1e4
"""Scores beyond it count as this: losses are in nats, and squares are added up in int64."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Positions whose score is above the value; of a sample that has any, at least one."""

    gain: float = 1.0
    """How far z moves for a share that is off by 1."""

    def __post_init__(self) -> None:
        refuse_knobs(self, lambda: [("gain", self.gain > 0.0, "must be above 0")])

    def count(
        self,
        values_N: Tensor,
        samples: Samples,
        *,
        keep_share: float,
        exchange: Exchange,
        state: QuotaState,
    ) -> tuple[Tensor, QuotaState]:
        mean, deviation = _moments(values_N, exchange)
        z = state.get(QUANTILE_STATE)
        if z is None:
            everything, _ = exchange(bits(values_N)[:, None])
            first = _quantile(numbers(everything[:, 0]), keep_share)
            if first is None:
                # Nothing was seen yet, or nothing is there: all is kept, and z waits.
                return samples.num_S, state
            z = (first - mean) / deviation
        sample_N = torch.arange(len(samples.keys)).repeat_interleave(samples.num_S)
        is_above_N = values_N > mean + z * deviation
        above_S = torch.bincount(sample_N[is_above_N], minlength=len(samples.keys))
        num_hard_S = above_S.clamp(min=1).minimum(samples.num_S)
        kept, total = _totals([num_hard_S.sum(), samples.num_S.sum()], exchange)
        share = kept / total if total else keep_share
        return num_hard_S, {QUANTILE_STATE: z + self.gain * (share - keep_share)}


def _moments(values_N: Tensor, exchange: Exchange) -> tuple[float, float]:
    """Return mean and standard deviation of the finite scores of all data ranks."""
    finite_N = values_N[values_N.isfinite()].clamp(-_LARGEST, _LARGEST)
    whole_N = (finite_N * _UNIT).round().long()
    count, total, squares = _totals(
        [torch.tensor(len(whole_N)), whole_N.sum(), (whole_N**2).sum()], exchange
    )
    if count == 0:
        return 0.0, 1.0
    variance = (count * squares - total * total) / count**2
    # Scores that are all alike are all above, or none.
    return total / count / _UNIT, math.sqrt(variance) / _UNIT or 1.0


def _quantile(values_M: Tensor, keep_share: float) -> float | None:
    """Return the value that the share p of the finite values is above; None if there is none."""
    finite_M = values_M[values_M.isfinite()].sort(descending=True).values
    if len(finite_M) == 0:
        return None
    return float(finite_M[min(len(finite_M) - 1, int(keep_share * len(finite_M)))])


def _totals(sums: list[Tensor], exchange: Exchange) -> list[int]:
    """Add whole numbers up over the data ranks."""
    rows_MC, _ = exchange(torch.stack(sums).long()[None])
    return rows_MC.sum(0).tolist()
