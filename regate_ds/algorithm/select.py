"""Turn scores into a plan: which positions of each row enter the gated layers.

Shapes: B rows, T positions of a row, K slots of a row after the gate, N label positions of the
micro-batch in reading order, P positions to choose among, G groups. All of this runs on the CPU.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ABSENT, ALWAYS, ELIDABLE, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan, pack


def fuse_scores(
    reference_N: Tensor, difficulty_N: Tensor, *, reference_weight: float, fusion: str
) -> Tensor:
    """Return one score [N] for each label position; a higher score is kept first.

    A target scores high if it is hard for the text-only reference or still hard for the student.
    ``additive`` is the paper's formula d = m + w * ref. ``convex`` is d = (1 - w) * m + w * ref,
    under which the paper's ablation calls w = 0 "student only" and w = 1 "reference only".
    """
    if fusion == "convex":
        return torch.lerp(difficulty_N, reference_N, reference_weight)
    return torch.add(difficulty_N, reference_N, alpha=reference_weight)


def num_hard_targets(num_labels: Tensor, keep_share: float) -> Tensor:
    """Return the number of targets to keep, k = ceil(p * n - 1e-9), for each sample."""
    return torch.ceil(num_labels.double() * keep_share - 1e-9).long()


def plan_sparse(
    batch: TokenBatch, score_N: Tensor, *, keep_share: float, align: str, token_multiple: int = 1
) -> ElisionPlan:
    """Keep all ALWAYS positions and, for each sample, the positions of its hardest targets.

    score_N: one finite score for each label position in reading order, as ``fuse_scores`` returns.
    token_multiple: each row is filled up to a multiple of it, by the next-best label positions.

    RuntimeError if a score is not finite.
    """
    score_BT = _checked(batch, score_N)
    keep_BT = _kept(batch, score_BT, keep_share, align)
    row_BT = torch.arange(len(keep_BT))[:, None].expand_as(keep_BT)
    fill_BT = _fill(batch, keep_BT, score_BT, row_BT, token_multiple)
    kept_BK = _positions(keep_BT | fill_BT, token_multiple)
    return replace(pack(batch, kept_BK, is_dense=False), num_filled=int(fill_BT.sum()))


def plan_ragged(
    batch: TokenBatch, score_N: Tensor, *, keep_share: float, align: str, token_multiple: int = 1
) -> ElisionPlan:
    """Plan as ``plan_sparse`` does, for the row format `ragged`: the total of the micro-batch, not
    each row, is filled up to the multiple, by the next-best label positions of any row."""
    score_BT = _checked(batch, score_N)
    keep_BT = _kept(batch, score_BT, keep_share, align)
    fill_BT = _fill(batch, keep_BT, score_BT, torch.zeros_like(batch.labels_BT), token_multiple)
    kept_BK = _positions(keep_BT | fill_BT, 1)
    return replace(pack(batch, kept_BK, is_dense=False), num_filled=int(fill_BT.sum()))


def _checked(batch: TokenBatch, score_N: Tensor) -> Tensor:
    """Return the scores at their positions [B, T]. RuntimeError if one is not finite."""
    is_bad_N = ~torch.isfinite(score_N)
    if bool(is_bad_N.any()):
        raise RuntimeError(
            f"the score of label position {int(is_bad_N.nonzero()[0])} of the micro-batch is "
            f"{float(score_N[is_bad_N][0])}, not finite: a reference or student loss is NaN or "
            "infinite; check the reference store, or resume from an earlier checkpoint"
        )
    return batch.at_labels(score_N.double())


def _kept(batch: TokenBatch, score_BT: Tensor, keep_share: float, align: str) -> Tensor:
    """Mark [B, T] what is kept before rows are filled up to the token multiple."""
    elidable_BT = batch.kind_BT == ELIDABLE
    aligned_BT = _aligned(batch, score_BT, elidable_BT, keep_share, align)
    return (batch.kind_BT == ALWAYS) | aligned_BT


def _aligned(
    batch: TokenBatch, score_BT: Tensor, elidable_BT: Tensor, keep_share: float, align: str
) -> Tensor:
    """Mark [B, T] the elidable positions that the k hardest targets of each sample keep."""
    num_samples = len(batch.flat_keys)
    num_elidable = torch.bincount(batch.sample_BT[elidable_BT], minlength=num_samples)
    num_hard = num_hard_targets(num_elidable, keep_share)
    # Position u holds the target of position u - 1 if u - 1 is a label position of the same sample.
    holds_BT = _shift_right(elidable_BT, False) & elidable_BT & _follows_in_sample(batch)
    if align == "target":
        held_score_BT = _shift_right(score_BT, 0.0)
        # Positions that hold no target rank after all that do, by their own score.
        return _top(
            [holds_BT, torch.where(holds_BT, held_score_BT, score_BT)],
            elidable_BT,
            batch.sample_BT,
            num_hard,
        )
    hard_BT = _top([score_BT], elidable_BT, batch.sample_BT, num_hard)
    if align == "both":
        return hard_BT | (_shift_right(hard_BT, False) & holds_BT)
    return hard_BT


def _top(ranks: list[Tensor], among_BT: Tensor, group_BT: Tensor, num_top: Tensor) -> Tensor:
    """Mark the first num_top[g] positions of each group g, by descending ranks, then by position.

    A stable sort, not a threshold, decides: all ranks of one replica must break ties alike.
    """
    where_P = among_BT.reshape(-1).nonzero().squeeze(1)
    order_P = torch.arange(len(where_P))
    for key_BT in reversed(ranks):
        key_P = key_BT.reshape(-1)[where_P][order_P]
        order_P = order_P[key_P.argsort(descending=True, stable=True)]
    group_P = group_BT.reshape(-1)[where_P]
    order_P = order_P[group_P[order_P].argsort(stable=True)]
    group_sizes = torch.bincount(group_P, minlength=len(num_top))
    start_P = (group_sizes.cumsum(0) - group_sizes)[group_P[order_P]]
    chosen_P = torch.arange(len(where_P)) - start_P < num_top[group_P[order_P]]
    top_BT = torch.zeros_like(among_BT)
    top_BT.view(-1)[where_P[order_P[chosen_P]]] = True
    return top_BT


def _fill(
    batch: TokenBatch, keep_BT: Tensor, score_BT: Tensor, group_BT: Tensor, token_multiple: int
) -> Tensor:
    """Mark the next-best label positions that bring each group's number kept to a multiple."""
    elidable_BT = batch.kind_BT == ELIDABLE
    missing_G = -torch.bincount(group_BT[keep_BT]) % token_multiple
    return _top([score_BT], elidable_BT & ~keep_BT, group_BT, missing_G)


def _positions(keep_BT: Tensor, token_multiple: int) -> Tensor:
    """Return [B, K]: each row's kept positions in reading order, then T for each padding slot."""
    num_rows, num_tokens = keep_BT.shape
    longest = int(keep_BT.sum(dim=1).max())
    num_slots = max(1, math.ceil(longest / token_multiple)) * token_multiple
    positions_BT = torch.where(keep_BT, torch.arange(num_tokens), num_tokens).sort(dim=1).values
    kept_BK = torch.full((num_rows, num_slots), num_tokens)
    kept_BK[:, :num_tokens] = positions_BT[:, :num_slots]
    return kept_BK


def _shift_right(x_BT: Tensor, first: float | bool) -> Tensor:
    shifted_BT = torch.roll(x_BT, 1, dims=1)
    shifted_BT[:, 0] = first
    return shifted_BT


def _follows_in_sample(batch: TokenBatch) -> Tensor:
    """Mark the positions whose left neighbour belongs to the same sample."""
    return (_shift_right(batch.segment_BT, -1) == batch.segment_BT) & (batch.kind_BT != ABSENT)
