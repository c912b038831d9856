"""The plan of a step as data: which positions of each row enter the gated layers.

Shapes: B rows, T positions of a row, K slots of a row after the gate, R real (not padding) slots of
the micro-batch, L kept targets.
"""

# torch's own types have gaps.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE, TokenBatch


@dataclass(frozen=True)
class ElisionPlan:
    """The kept positions of one micro-batch, and what the decoder and the loss need to use them."""

    is_dense: bool
    """True if nothing is elided: each slot is the position itself, padding included."""

    num_tokens: int
    """T, the length of a row before the gate."""

    kept_BK: Tensor
    """int64: position of each slot, in reading order; padding slots, at the end, point to 0."""

    segment_BK: Tensor
    """int64: which sample of its row a slot belongs to; -1 is padding. Attention stays inside it.
    """

    labels_BK: Tensor
    """int64: target of each slot, IGNORE where it has none. The loss is computed on all targets."""

    slot_R: Tensor
    """int64: the real slots as flat indices into [B * K]."""

    position_R: Tensor
    """int64: the positions of the real slots as flat indices into [B * T]."""

    label_slot_L: Tensor
    """int64: the slots with a target as flat indices into [B * K], in reading order."""

    label_position_L: Tensor
    """int64: the positions of the kept targets as flat indices into [B * T]."""

    run_lengths: tuple[int, ...]
    """Lengths of the runs of slots, in the flattened [B * K], that hold one sample or padding."""

    token_run_lengths: tuple[int, ...]
    """Lengths of such runs of positions in the flattened [B * T], for layers that see every token.
    """

    is_packed: bool
    """True if a row holds several samples: causal order alone does not keep them apart then."""

    num_filled: int = 0
    """Number of label positions kept only to reach the token multiple."""

    step: int = 0
    """Number of the optimizer step that is planned."""

    micro: int = 0
    """Number of the micro-batch within that step."""

    @property
    def num_slots(self) -> int:
        """K, the length of a row after the gate."""
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


def plan_dense(batch: TokenBatch) -> ElisionPlan:
    """Keep every position, padding included: the layers compute what the host's own would."""
    num_rows, num_tokens = batch.labels_BT.shape
    return pack(batch, torch.arange(num_tokens).expand(num_rows, -1), is_dense=True)


def pack(batch: TokenBatch, kept_BK: Tensor, *, is_dense: bool) -> ElisionPlan:
    """Make the plan that keeps the positions ``kept_BK``, where T means a padding slot."""
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
    """Make a plan from its slots alone, which is all that some ranks are sent."""
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
    """Return the plan with padding slots added to each row, up to ``num_slots``.

    A dense plan is returned as it is.
    """
    missing = num_slots - plan.num_slots
    if plan.is_dense or missing == 0:
        return plan

    def pad(x_BK: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x_BK, (0, missing), value=value)

    slots = Slots(pad(plan.kept_BK, 0), pad(plan.segment_BK, -1), pad(plan.labels_BK, IGNORE))
    widened = assemble_plan(
        slots,
        num_tokens=plan.num_tokens,
        is_dense=False,
        is_packed=plan.is_packed,
        token_run_lengths=plan.token_run_lengths,
    )
    return replace(widened, num_filled=plan.num_filled, step=plan.step, micro=plan.micro)


def _run_lengths(segment_BK: Tensor) -> tuple[int, ...]:
    num_rows, num_slots = segment_BK.shape
    # Segments are numbered through the rows, so that equal ones of neighbouring rows differ.
    run_BK = segment_BK + (num_slots + 1) * torch.arange(num_rows)[:, None]
    return tuple(run_BK.reshape(-1).unique_consecutive(return_counts=True)[1].tolist())


@dataclass(frozen=True)
class StepPlan:
    """The plans of all micro-batches of one optimizer step on this data rank."""

    step: int
    is_dense: bool
    micro: tuple[ElisionPlan, ...]
    num_targets_global: int
    """Number of targets of the step over all data ranks; divide the summed loss by it."""

    counts: dict[str, int]
    """Totals over all data ranks, by the names in COUNTS."""
