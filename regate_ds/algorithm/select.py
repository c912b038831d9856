"""Turn scores into a plan: which positions of each row enter the gated layers.

Shapes: B rows, T positions, K slots of a packed row, R real (not padding) slots of the whole
micro-batch, N label positions of the micro-batch in reading order. All of this runs on the host.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import ABSENT, ALWAYS, ELIDABLE, IGNORE, TokenBatch


@dataclass(frozen=True)
class ElisionPlan:
    """The kept positions of one micro-batch, and what the decoder and the loss need of them."""

    is_dense: bool
    """Nothing is elided and nothing moved: slots are positions, padding included."""

    num_tokens: int
    """T, the length of a row before the gate."""

    kept_BK: Tensor
    """int64: position of each slot, in reading order; padding slots, at the end, point to 0."""

    segment_BK: Tensor
    """int64: sample of the row that a slot belongs to; -1 is padding. Attention stays inside."""

    labels_BK: Tensor
    """int64: target of each slot, IGNORE where it has none. The loss runs on all targets."""

    slot_R: Tensor
    """int64: real slots as flat indices into [B * K]."""

    position_R: Tensor
    """int64: the positions of the real slots as flat indices into [B * T]."""

    label_slot_L: Tensor
    """int64: slots that have a target as flat indices into [B * K]; L of them, in reading order."""

    label_position_L: Tensor
    """int64: positions of the kept targets as flat indices into [B * T]."""

    run_lengths: tuple[int, ...]
    """Lengths of the runs of one sample, or of padding, through the flattened [B * K] slots."""

    token_run_lengths: tuple[int, ...]
    """The same through the flattened [B * T] positions, for layers that see every token."""

    is_packed: bool
    """Some row holds several samples, so that causal order alone does not bound attention."""

    num_filled: int = 0
    """Label positions kept only to reach the token multiple."""

    step: int = 0
    """The optimizer step that this plan is of."""

    micro: int = 0
    """The micro-batch of that step."""

    @property
    def num_slots(self) -> int:
        """K, the length of a packed row."""
        return self.kept_BK.shape[1]

    @property
    def num_kept(self) -> int:
        return len(self.slot_R)

    @property
    def num_padded(self) -> int:
        return self.segment_BK.numel() - self.num_kept

    @property
    def num_targets(self) -> int:
        return len(self.label_slot_L)

    @property
    def targets_L(self) -> Tensor:
        return self.labels_BK.reshape(-1)[self.label_slot_L]

    def to(self, device: torch.device | str) -> ElisionPlan:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Slots:
    """What each slot [B, K] of a micro-batch holds; padding has segment -1 and no label."""

    kept_BK: Tensor
    segment_BK: Tensor
    labels_BK: Tensor


def fuse_scores(
    reference_N: Tensor, difficulty_N: Tensor, *, reference_weight: float, fusion: str
) -> Tensor:
    """Rank targets: hard for the text-only reference, or still hard for the student.

    ``additive`` is the paper's formula d = m + w * ref; ``convex`` is d = (1 - w) * m + w * ref,
    the reading under which its ablation names w = 0 "student only" and w = 1 "reference only".
    """
    if fusion == "convex":
        return torch.lerp(difficulty_N, reference_N, reference_weight)
    return torch.add(difficulty_N, reference_N, alpha=reference_weight)


def num_hard_targets(num_labels: Tensor, keep_share: float) -> Tensor:
    """k = ceil(p * n - 1e-9) for each sample."""
    return torch.ceil(num_labels.double() * keep_share - 1e-9).long()


def plan_dense(batch: TokenBatch) -> ElisionPlan:
    """Keep everything: what the host itself would compute, padding included."""
    num_rows, num_tokens = batch.labels_BT.shape
    return _pack(batch, torch.arange(num_tokens).expand(num_rows, -1), is_dense=True)


def plan_sparse(
    batch: TokenBatch, score_N: Tensor, *, keep_share: float, align: str, token_multiple: int = 1
) -> ElisionPlan:
    """Keep what must stay and, of each sample's label positions, those of the hardest targets.

    score_N: one finite score for each label position in reading order, as from ``fuse_scores``.
    """
    score_BT = _checked(batch, score_N)
    keep_BT = _kept(batch, score_BT, keep_share, align)
    row_BT = torch.arange(len(keep_BT))[:, None].expand_as(keep_BT)
    fill_BT = _fill(batch, keep_BT, score_BT, row_BT, token_multiple)
    kept_BK = _positions(keep_BT | fill_BT, token_multiple)
    return replace(_pack(batch, kept_BK, is_dense=False), num_filled=int(fill_BT.sum()))


def plan_ragged(
    batch: TokenBatch, score_N: Tensor, *, keep_share: float, align: str, token_multiple: int = 1
) -> ElisionPlan:
    """As ``plan_sparse``, where all kept tokens of a micro-batch lie behind one another: their
    number is filled up to the multiple by the next-best label positions of any row."""
    score_BT = _checked(batch, score_N)
    keep_BT = _kept(batch, score_BT, keep_share, align)
    fill_BT = _fill(batch, keep_BT, score_BT, torch.zeros_like(batch.labels_BT), token_multiple)
    kept_BK = _positions(keep_BT | fill_BT, 1)
    return replace(_pack(batch, kept_BK, is_dense=False), num_filled=int(fill_BT.sum()))


def _checked(batch: TokenBatch, score_N: Tensor) -> Tensor:
    """Scores at their positions [B, T]."""
    if not bool(torch.isfinite(score_N).all()):
        raise RuntimeError("a score is not finite: a reference or student loss is NaN or infinite")
    return batch.at_labels(score_N.double())


def _kept(batch: TokenBatch, score_BT: Tensor, keep_share: float, align: str) -> Tensor:
    """What is kept before any filling."""
    elidable_BT = batch.kind_BT == ELIDABLE
    aligned_BT = _aligned(batch, score_BT, elidable_BT, keep_share, align)
    return (batch.kind_BT == ALWAYS) | aligned_BT


def _aligned(
    batch: TokenBatch, score_BT: Tensor, elidable_BT: Tensor, keep_share: float, align: str
) -> Tensor:
    """The elidable positions that each sample's k hardest targets keep."""
    num_samples = len(batch.flat_keys)
    num_elidable = torch.bincount(batch.sample_BT[elidable_BT], minlength=num_samples)
    num_hard = num_hard_targets(num_elidable, keep_share)
    # Position u holds the target of position u - 1, where that one is a label of the same sample.
    holds_BT = _shift_right(elidable_BT, False) & elidable_BT & _follows_in_sample(batch)
    if align == "target":
        held_score_BT = _shift_right(score_BT, 0.0)
        # Positions that hold no target come after all that do, ranked by their own score.
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

    Sorted by stable indices, not by a threshold: ranks of one model replica must break ties alike.
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
    """The next-best label positions that bring what each group keeps to a multiple."""
    elidable_BT = batch.kind_BT == ELIDABLE
    missing_G = -torch.bincount(group_BT[keep_BT]) % token_multiple
    return _top([score_BT], elidable_BT & ~keep_BT, group_BT, missing_G)


def _positions(keep_BT: Tensor, token_multiple: int) -> Tensor:
    """Kept positions of each row in reading order, then T for padding up to the longest row."""
    num_rows, num_tokens = keep_BT.shape
    longest = int(keep_BT.sum(dim=1).max())
    num_slots = max(1, math.ceil(longest / token_multiple)) * token_multiple
    positions_BT = torch.where(keep_BT, torch.arange(num_tokens), num_tokens).sort(dim=1).values
    kept_BK = torch.full((num_rows, num_slots), num_tokens)
    kept_BK[:, :num_tokens] = positions_BT[:, :num_slots]
    return kept_BK


def _pack(batch: TokenBatch, kept_BK: Tensor, *, is_dense: bool) -> ElisionPlan:
    """Select by ``kept_BK`` (T means padding) what the decoder and the loss need."""
    num_tokens = batch.labels_BT.shape[1]
    is_real_BK = kept_BK < num_tokens
    kept_BK = kept_BK.masked_fill(~is_real_BK, 0)
    slots = Slots(
        kept_BK,
        batch.segment_BT.gather(1, kept_BK).masked_fill(~is_real_BK, -1),
        batch.labels_BT.gather(1, kept_BK).masked_fill(~is_real_BK, IGNORE),
    )
    return assemble_plan(
        slots,
        num_tokens=num_tokens,
        is_dense=is_dense,
        is_packed=any(len(row) > 1 for row in batch.keys),
        token_run_lengths=_run_lengths(batch.segment_BT),
    )


def assemble_plan(
    slots: Slots,
    *,
    num_tokens: int,
    is_dense: bool,
    is_packed: bool,
    token_run_lengths: tuple[int, ...] = (),
) -> ElisionPlan:
    """The whole plan from what its slots hold, as on a rank that was sent only these."""
    kept_BK, segment_BK, labels_BK = slots.kept_BK, slots.segment_BK, slots.labels_BK
    slot_R = (segment_BK >= 0).reshape(-1).nonzero().squeeze(1)
    flat_K = (kept_BK + num_tokens * torch.arange(len(kept_BK))[:, None]).reshape(-1)
    label_slot_L = (labels_BK != IGNORE).reshape(-1).nonzero().squeeze(1)
    return ElisionPlan(
        is_dense=is_dense,
        num_tokens=num_tokens,
        kept_BK=kept_BK,
        segment_BK=segment_BK,
        labels_BK=labels_BK,
        slot_R=slot_R,
        position_R=flat_K[slot_R],
        label_slot_L=label_slot_L,
        label_position_L=flat_K[label_slot_L],
        run_lengths=_run_lengths(segment_BK),
        token_run_lengths=token_run_lengths,
        is_packed=is_packed,
    )


def widen(plan: ElisionPlan, num_slots: int) -> ElisionPlan:
    """The same plan with rows of ``num_slots`` slots: padding at their ends, nothing else kept."""
    missing = num_slots - plan.num_slots
    if plan.is_dense or missing == 0:
        return plan

    def wider(x_BK: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x_BK, (0, missing), value=value)

    slots = Slots(wider(plan.kept_BK, 0), wider(plan.segment_BK, -1), wider(plan.labels_BK, IGNORE))
    wide = assemble_plan(
        slots,
        num_tokens=plan.num_tokens,
        is_dense=False,
        is_packed=plan.is_packed,
        token_run_lengths=plan.token_run_lengths,
    )
    return replace(wide, num_filled=plan.num_filled, step=plan.step, micro=plan.micro)


def _run_lengths(segment_BK: Tensor) -> tuple[int, ...]:
    num_rows, num_slots = segment_BK.shape
    # Numbered through the rows, so that equal segments of neighbouring rows differ.
    run_BK = segment_BK + (num_slots + 1) * torch.arange(num_rows)[:, None]
    return tuple(run_BK.reshape(-1).unique_consecutive(return_counts=True)[1].tolist())


def _shift_right(x_BT: Tensor, first: float | bool) -> Tensor:
    shifted_BT = torch.roll(x_BT, 1, dims=1)
    shifted_BT[:, 0] = first
    return shifted_BT


def _follows_in_sample(batch: TokenBatch) -> Tensor:
    """True where the position before belongs to the same sample."""
    return (_shift_right(batch.segment_BT, -1) == batch.segment_BT) & (batch.kind_BT != ABSENT)
