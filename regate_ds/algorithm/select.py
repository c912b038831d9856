"""Choose positions by rank: the highest of each group, by stable order.

Shapes: B rows, T positions, K slots of a row, P positions that are chosen among, G groups. All of
this runs on the CPU.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ABSENT, TokenBatch


def top(ranks: list[Tensor], among_BT: Tensor, group_BT: Tensor, num_top_G: Tensor) -> Tensor:
    """Mark the first num_top[g] positions of each group g, by descending ranks, then by position.

    Sorted by stable indices, not by a threshold: ranks of one model replica must break ties alike.
    """
    where_P = among_BT.reshape(-1).nonzero().squeeze(1)
    place_P = torch.arange(len(where_P))
    order_P = place_P
    for key_BT in reversed(ranks):
        key_P = key_BT.reshape(-1)[where_P][order_P]
        order_P = order_P[key_P.argsort(descending=True, stable=True)]
    group_P = group_BT.reshape(-1)[where_P]
    order_P = order_P[group_P[order_P].argsort(stable=True)]
    size_G = torch.bincount(group_P, minlength=len(num_top_G))
    end_G = size_G.cumsum(0) - size_G + num_top_G
    top_BT = torch.zeros_like(among_BT)
    top_BT.view(-1)[where_P[order_P]] = place_P < end_G.repeat_interleave(size_G)
    return top_BT


def kept_positions(keep_BT: Tensor, multiple: int) -> Tensor:
    """Return int64 [B, K]: kept positions in reading order, then T as padding up to the longest."""
    num_rows, num_tokens = keep_BT.shape
    num_B = keep_BT.sum(dim=1)
    num_slots = max(1, math.ceil(int(num_B.max()) / multiple)) * multiple
    is_filled_BK = torch.arange(num_slots) < num_B[:, None]
    kept_BK = torch.full((num_rows, num_slots), num_tokens)
    return kept_BK.masked_scatter_(is_filled_BK, keep_BT.nonzero()[:, 1])


def shift_right(x_BT: Tensor, first: float | bool) -> Tensor:
    """Move values one position to the right, with ``first`` at the start of each row."""
    shifted_BT = torch.roll(x_BT, 1, dims=1)
    shifted_BT[:, 0] = first
    return shifted_BT


def shift_left(x_BT: Tensor, last: float | bool) -> Tensor:
    """Move values one position to the left, with ``last`` at the end of each row."""
    shifted_BT = torch.roll(x_BT, -1, dims=1)
    shifted_BT[:, -1] = last
    return shifted_BT


def follows_in_sample(batch: TokenBatch) -> Tensor:
    """Mark positions whose left neighbour belongs to the same sample."""
    return (shift_right(batch.segment_BT, -1) == batch.segment_BT) & (batch.kind_BT != ABSENT)
