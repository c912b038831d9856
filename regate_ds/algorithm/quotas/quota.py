"""The contract of a quota.

    num_hard_S, state = quota.count(values_N, samples, keep_share=p, exchange=..., state=...)

how many of each sample's elidable label positions are hard targets, as integers that are known
before the forward pass. A sample's own order is by value, then by position; ties between samples
go by their keys in an order that is the same on all ranks (a hash of the data set's name, then the
record).

Shapes: S samples of the window on this data rank, N elidable label positions of these, sample by
sample; M rows of all data ranks, C columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from regate_ds.algorithm.batch import SampleKey

Exchange = Callable[[Tensor], tuple[Tensor, int]]
"""Rows of every data rank, one rank's after the other's, from this rank's int64 [N, C]; and the
index at which this rank's rows begin. Collective over the data ranks."""

QuotaState = dict[str, float]
"""What a quota remembers from step to step; equal on all data ranks, saved with the schedule."""


@dataclass(frozen=True)
class Samples:
    """The samples that a quota shares the step's budget among."""

    keys: tuple[SampleKey, ...]
    num_S: Tensor
    """int64: elidable label positions of each sample."""


class Quota(Protocol):
    """A frozen dataclass with the knobs of one rule."""

    def count(
        self,
        values_N: Tensor,
        samples: Samples,
        *,
        keep_share: float,
        exchange: Exchange,
        state: QuotaState,
    ) -> tuple[Tensor, QuotaState]:
        """Return the number kept of each sample (int64 [S], between 0 and what it has), and the
        state after this step. Collective over data ranks if it calls ``exchange``."""
        ...


def alone(rows_NC: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a single data rank: the ``Exchange`` of a run without others."""
    return rows_NC, 0


def share_of(num: Tensor, share: float) -> Tensor:
    """Return ceil(share * n - 1e-9), element by element."""
    return torch.ceil(num.double() * share - 1e-9).long()


def bits(values: Tensor) -> Tensor:
    """View fp64 numbers as int64, to send them exactly."""
    return values.double().view(torch.int64)


def numbers(bits_N: Tensor) -> Tensor:
    """Undo ``bits``."""
    return bits_N.contiguous().view(torch.float64)


def key_rows(samples: Samples) -> Tensor:
    """Return int64 [N, 3] that orders positions alike on all ranks: data set, record, position."""
    rows = [(_name_number(name), record) for name, record in samples.keys]
    keys_S2 = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    start_S = samples.num_S.cumsum(0) - samples.num_S
    position_N = torch.arange(int(samples.num_S.sum())) - start_S.repeat_interleave(samples.num_S)
    return torch.cat([keys_S2.repeat_interleave(samples.num_S, 0), position_N[:, None]], 1)


def order_by(columns: list[Tensor]) -> Tensor:
    """Return the order that sorts rows ascending by the first column, then the next ones."""
    order_M = torch.arange(len(columns[0]))
    for column_M in reversed(columns):
        order_M = order_M[column_M[order_M].argsort(stable=True)]
    return order_M


def _name_number(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
