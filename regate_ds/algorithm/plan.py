"""The plan of a step as data: which positions of each row enter the gated layers.

Shapes: B rows, T positions, K slots of a row, R real (not padding) slots of the micro-batch, L
targets, S samples.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.executions.patches import Patches


@dataclass(frozen=True)
class ElisionPlan:
    """The kept positions of one micro-batch, and what the decoder and the loss need of them."""

    moves_rows: bool
    """False: slots are positions, padding included, and layers see the rows as the host has them.
    Something may be elided from the loss all the same."""

    num_tokens: int
    """T, the length of a row before the gate."""

    kept_BK: Tensor
    """int64: position of each slot, in reading order; padding slots, at the end, point to 0.
    Where no row moves, slots are positions."""

    segment_BK: Tensor
    """int64: sample of the row that a slot belongs to; -1 is padding. Attention stays inside."""

    slot_R: Tensor
    """int64: real slots as flat indices into [B * K]."""

    position_R: Tensor
    """int64: the positions of the real slots as flat indices into [B * T]."""

    label_slot_L: Tensor
    """int64: for each target of the loss the slot that predicts it, as a flat index into [B * K],
    in reading order. A slot may predict several. All -1 where the loss runs on full rows: a
    position without a slot may then have a target."""

    label_position_L: Tensor
    """int64: for each target the position whose label it is, as a flat index into [B * T]."""

    targets_L: Tensor
    """int64: token ids that the loss asks for."""

    run_lengths: tuple[int, ...]
    """Lengths of the runs of one sample, or of padding, through the flattened [B * K] slots."""

    token_run_lengths: tuple[int, ...]
    """The same through the flattened [B * T] positions, for layers that see every token."""

    is_packed: bool
    """Some row holds several samples, so that causal order alone does not bound attention."""

    weight_L: Tensor | None = None
    """fp32 weight of each target in the summed loss; None is 1 for all."""

    sets: tuple[ElisionPlan, ...] = ()
    """Where spans have kept sets of their own: one plan for each, of which only the slots are read.
    The slots of this plan are then those of the first, and as many are kept in each."""

    num_chosen: int | None = None
    """How many of the targets have a loss, chosen after the forward pass; None is all of them."""

    reference_L: Tensor | None = None
    """fp32: the reference store's value of each target, where that choice reads one."""

    patches: Patches | None = None
    """Where several positions are one slot. The decoder then reads slots in place of tokens, each
    row is ``num_tokens`` slots long, and ``position_R`` has the first position of each."""

    num_filled: int = 0
    """Positions kept only to reach the row's multiple."""

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
        return len(self.label_slot_L) if self.num_chosen is None else self.num_chosen

    @property
    def sample_lengths(self) -> Tensor:
        """int64 [S]: kept positions of each sample, in reading order."""
        sample_R = (self.slot_R // self.num_slots) * (self.num_slots + 1)
        sample_R = sample_R + self.segment_BK.reshape(-1)[self.slot_R]
        return sample_R.unique_consecutive(return_counts=True)[1]

    def head_rows(self, *, packed: bool) -> Tensor:
        """Return which of the decoder's rows the head reads; packed: whether they are slots."""
        if self.patches is not None:
            return self.patches.predicts_U
        return self.label_slot_L if packed else self.label_position_L

    @property
    def sample_starts(self) -> Tensor:
        """int64 [S]: where each sample starts in [B * T]: its first position is always kept."""
        lengths_S = self.sample_lengths
        return self.position_R[lengths_S.cumsum(0) - lengths_S]

    def to(self, device: torch.device | str) -> ElisionPlan:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        patches = None if self.patches is None else self.patches.to(device)
        sets = tuple(one.to(device) for one in self.sets)
        return replace(self, **tensors, sets=sets, patches=patches)


@dataclass(frozen=True)
class StepPlan:
    """The decision for all micro-batches of one optimizer step, on this data rank."""

    step: int
    is_dense: bool
    """Nothing is elided, from no layer and no loss: by the schedule, or by the configuration."""

    micro: tuple[ElisionPlan, ...]
    num_targets_global: int
    """Targets of the step over all data ranks: what the summed loss is divided by."""

    counts: dict[str, int]
    """Over all data ranks, by the names of COUNTS."""

    tallies: tuple[int, ...] = ()
    """Sums over all data ranks of what the host counted beside; the method does not read them."""

    is_merged: bool = False
    """Slots are patches of several positions, in all layers; nothing is elided."""


@dataclass(frozen=True)
class Slots:
    """What each slot [B, K] of a micro-batch holds, and the targets that slots predict."""

    kept_BK: Tensor
    segment_BK: Tensor
    label_slot_L: Tensor
    targets_L: Tensor


def plan_dense(batch: TokenBatch) -> ElisionPlan:
    """Keep everything: what the host itself would compute, padding included."""
    return plan_loss(batch)


def plan_loss(batch: TokenBatch, target_BT: Tensor | None = None) -> ElisionPlan:
    """Keep every position in every layer; the loss is on all labels, or those at ``target_BT``."""
    kept_BK = torch.arange(batch.labels_BT.shape[1]).expand(len(batch.labels_BT), -1)
    return _pack(batch, kept_BK, target_BT, moves_rows=False)


def plan_rows(batch: TokenBatch, kept_BK: Tensor, target_BT: Tensor | None = None) -> ElisionPlan:
    """Keep the positions ``kept_BK`` of each row (T means padding), with the loss on the labels
    among them, or on those of them at ``target_BT``."""
    return _pack(batch, kept_BK, target_BT, moves_rows=True)


def with_all_labels(plan: ElisionPlan, batch: TokenBatch) -> ElisionPlan:
    """Return the plan with the loss on every label of its micro-batch, kept or not."""
    labels_P = batch.labels_BT.reshape(-1)
    position_L = (labels_P != IGNORE).nonzero().squeeze(1)
    return replace(
        plan,
        label_slot_L=torch.full_like(position_L, -1),
        label_position_L=position_L,
        targets_L=labels_P[position_L],
    )


def _pack(
    batch: TokenBatch, kept_BK: Tensor, target_BT: Tensor | None, *, moves_rows: bool
) -> ElisionPlan:
    """Select by ``kept_BK`` what the decoder and the loss need."""
    num_tokens = batch.labels_BT.shape[1]
    is_real_BK = kept_BK < num_tokens
    kept_BK = kept_BK.masked_fill(~is_real_BK, 0)
    segment_BK = batch.segment_BT.gather(1, kept_BK).masked_fill(~is_real_BK, -1)
    is_none_BK = ~is_real_BK if target_BT is None else ~(is_real_BK & target_BT.gather(1, kept_BK))
    labels_P = batch.labels_BT.gather(1, kept_BK).masked_fill(is_none_BK, IGNORE).reshape(-1)
    label_slot_L = (labels_P != IGNORE).nonzero().squeeze(1)
    return assemble_plan(
        Slots(kept_BK, segment_BK, label_slot_L, labels_P[label_slot_L]),
        num_tokens=num_tokens,
        moves_rows=moves_rows,
        is_packed=any(len(row) > 1 for row in batch.keys),
        token_run_lengths=run_lengths_of(batch.segment_BT),
    )


def assemble_plan(
    slots: Slots,
    *,
    num_tokens: int,
    moves_rows: bool,
    is_packed: bool,
    token_run_lengths: tuple[int, ...] = (),
) -> ElisionPlan:
    """Return the full plan from what its slots hold, as on a rank that was sent only these."""
    kept_BK, segment_BK = slots.kept_BK, slots.segment_BK
    slot_R = (segment_BK >= 0).reshape(-1).nonzero().squeeze(1)
    flat_K = (kept_BK + num_tokens * torch.arange(len(kept_BK))[:, None]).reshape(-1)
    return ElisionPlan(
        moves_rows=moves_rows,
        num_tokens=num_tokens,
        kept_BK=kept_BK,
        segment_BK=segment_BK,
        slot_R=slot_R,
        position_R=flat_K[slot_R],
        label_slot_L=slots.label_slot_L,
        label_position_L=flat_K[slots.label_slot_L],
        targets_L=slots.targets_L,
        run_lengths=run_lengths_of(segment_BK),
        token_run_lengths=token_run_lengths,
        is_packed=is_packed,
    )


def run_lengths_of(segment_BK: Tensor) -> tuple[int, ...]:
    """Return the lengths of the runs of one sample, or of padding, through the flattened slots."""
    num_rows, num_slots = segment_BK.shape
    # Numbered through the rows, so that equal segments of neighbouring rows differ.
    run_BK = segment_BK + (num_slots + 1) * torch.arange(num_rows)[:, None]
    return tuple(run_BK.reshape(-1).unique_consecutive(return_counts=True)[1].tolist())
