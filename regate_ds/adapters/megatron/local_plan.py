"""A micro-batch's plan as one rank of the replica sees it: which rows it holds, sends and scores.

Everything here is computed from the plan and the rank's place, without a collective.

Shapes: B rows, T positions, K slots, R real slots, L targets; Megatron's tensors are [S, B, H], so
that index i of row b is the flattened row i * B + b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from regate_ds.adapters.megatron.place import Place
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.parallel.resharding import Route, Rows, SequenceCut, make_route


@dataclass(frozen=True)
class Packing:
    """Bounds of the samples in a ragged micro-batch, each with the padding that makes its cut even;
    padding at the end is one of its own."""

    cumulative: Tensor
    longest: int


@dataclass(frozen=True)
class LocalPlan:
    """One rank's share of a micro-batch."""

    plan: ElisionPlan
    full_shape: tuple[int, int]
    """[S, B] that this rank holds of what ungated layers see."""

    kept_shape: tuple[int, int]
    """[S, B] of what gated layers see."""

    gather: Route | None
    """From the full rows to the kept ones; None if nothing is elided."""

    elided_N: Tensor | None
    """Rows here that go around the gated layers, padding of the full rows included; None where
    nothing is elided or the full sequence is not restored."""

    rotary_position: Tensor
    """int64 [S, B]: original positions of this context rank's kept slots; of all context ranks' in
    ragged rows, of which Megatron takes its part."""

    packing: Packing | None
    padding_BK: Tensor | None
    """bool [B, S]: True at padding slots here; None if there are none."""

    head: Route
    """From the decoder's output to the rows that have a target."""

    targets_P: Tensor
    """Targets of this context rank, then padding up to a multiple of the sequence cut."""

    context_L: Tensor
    """Context rank that has each of the plan's targets, in CPU memory."""

    num_targets: int
    """Targets of this context rank."""

    @property
    def is_dense(self) -> bool:
        return self.plan.is_dense

    @property
    def head_shape(self) -> tuple[int, int]:
        return (len(self.targets_P), 1)

    def to(self, device: torch.device | str) -> LocalPlan:
        values = {k: v for k, v in vars(self).items() if k != "context_L"}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | Route)}
        if self.packing is not None:
            moved["packing"] = replace(self.packing, cumulative=self.packing.cumulative.to(device))
        return replace(self, **moved)


def localise(plan: ElisionPlan, place: Place) -> LocalPlan:
    """The share of the rank at ``place``."""
    full_RN = _full_rows(plan.position_R, plan, place)
    ragged = _ragged(plan, place) if place.ragged else None
    kept_RN, kept_shape = _kept_rows(plan, place, ragged)
    elides = not plan.is_dense
    gather = make_route(full_RN, kept_RN, place.rank, place.cut.size) if elides else None
    packed_end = elides and not place.ends_early
    real_L = torch.searchsorted(plan.slot_R, plan.label_slot_L)
    targets_RN = kept_RN[real_L] if packed_end else _full_rows(plan.label_position_L, plan, place)
    context_L = targets_RN.rank_N // place.sequence_size
    own_L = (context_L == place.context_rank).nonzero().squeeze(1)
    targets_P, head = _head(plan.targets_L[own_L], targets_RN[own_L], place)
    num_rows, num_tokens = len(plan.kept_BK), plan.num_tokens
    return LocalPlan(
        plan=plan,
        full_shape=(num_tokens // place.cut.size, num_rows),
        kept_shape=kept_shape if elides else (num_tokens // place.cut.size, num_rows),
        gather=gather,
        elided_N=_elided(gather, num_rows * num_tokens // place.cut.size, place),
        rotary_position=_rotary_position(plan, place, ragged),
        packing=_packing(ragged) if elides and ragged is not None else None,
        padding_BK=_padding(plan, place, kept_RN, kept_shape) if elides else None,
        head=head,
        targets_P=targets_P,
        context_L=context_L,
        num_targets=len(own_L),
    )


def _elided(gather: Route | None, num_rows: int, place: Place) -> Tensor | None:
    if gather is None or not place.ends_early:
        return None
    stays = torch.ones(num_rows, dtype=torch.bool)
    stays[gather.sent_N] = False
    return stays.nonzero().squeeze(1)


def _full_rows(position_N: Tensor, plan: ElisionPlan, place: Place) -> Rows:
    """Where flat positions in [B * T] lie before the gate."""
    rank_T, index_T = place.cut.owners(plan.num_tokens)
    row_N, t_N = position_N // plan.num_tokens, position_N % plan.num_tokens
    return Rows(rank_T[t_N], index_T[t_N] * len(plan.kept_BK) + row_N)


def _kept_rows(
    plan: ElisionPlan, place: Place, ragged: _Ragged | None
) -> tuple[Rows, tuple[int, int]]:
    """Where the real slots lie after the gate, and the shape of what this rank then holds."""
    if ragged is not None:
        rows = Rows(*place.cut.owners(*ragged.lengths))[ragged.index_R]
        return rows, (sum(ragged.lengths) // place.cut.size, 1)
    num_rows, num_slots = plan.kept_BK.shape
    rank_K, index_K = place.cut.owners(num_slots)
    row_R, k_R = plan.slot_R // num_slots, plan.slot_R % num_slots
    return Rows(rank_K[k_R], index_K[k_R] * num_rows + row_R), (
        num_slots // place.cut.size,
        num_rows,
    )


@dataclass(frozen=True)
class _Ragged:
    """How a micro-batch's samples lie behind one another."""

    lengths: list[int]
    """Rows of each sample, padded so that context ranks can cut it; last, padding alone."""

    kept: Tensor
    """Rows of each sample that hold something."""

    index_R: Tensor
    """Where each real slot lies."""


def _ragged(plan: ElisionPlan, place: Place) -> _Ragged:
    kept = _sample_lengths(plan)
    padded = (kept + place.cut.zigzag - 1) // place.cut.zigzag * place.cut.zigzag
    end = int(padded.sum())
    missing = max(1, math.ceil(end / place.multiple)) * place.multiple - end
    skipped = (padded - kept).cumsum(0) - (padded - kept)
    index_R = torch.arange(plan.num_kept) + skipped.repeat_interleave(kept)
    return _Ragged(padded.tolist() + [missing] * (missing > 0), kept, index_R)


def ragged_padding(plan: ElisionPlan, *, place: Place) -> int:
    """Rows of a micro-batch that hold nothing."""
    if plan.is_dense:
        return plan.num_padded
    return sum(_ragged(plan, place).lengths) - plan.num_kept


def _head(targets_L: Tensor, rows: Rows, place: Place) -> tuple[Tensor, Route]:
    """Rows that have a target, cut anew over the tensor ranks: at least one for each of them."""
    size = place.sequence_size
    length = max(1, math.ceil(len(targets_L) / size)) * size
    rank_P, index_P = SequenceCut(1, size).owners(length)
    before = Rows(rows.rank_N % size, rows.row_N)
    after = Rows(rank_P[: len(targets_L)], index_P[: len(targets_L)])
    targets_P = torch.nn.functional.pad(targets_L, (0, length - len(targets_L)))
    return targets_P, make_route(before, after, place.sequence_rank, size)


def _rotary_position(plan: ElisionPlan, place: Place, ragged: _Ragged | None) -> Tensor:
    """Positions in the sample, which starts anew wherever a row holds several."""
    if ragged is None:
        held_K = SequenceCut(place.context_size).held(plan.num_slots)[place.context_rank]
        return plan.kept_BK[:, held_K].T.contiguous()
    # A sample's first position is always kept, and is the first of its slots.
    first_R = plan.position_R[ragged.kept.cumsum(0) - ragged.kept].repeat_interleave(ragged.kept)
    position_P = torch.zeros(sum(ragged.lengths), dtype=torch.long)
    position_P[ragged.index_R] = plan.position_R - first_R
    return position_P[:, None]


def _sample_lengths(plan: ElisionPlan) -> Tensor:
    """Kept positions of each sample, in reading order."""
    num_slots = plan.num_slots
    sample_R = (plan.slot_R // num_slots) * (num_slots + 1)
    sample_R = sample_R + plan.segment_BK.reshape(-1)[plan.slot_R]
    return sample_R.unique_consecutive(return_counts=True)[1]


def _packing(ragged: _Ragged) -> Packing:
    cumulative = torch.tensor([0, *accumulate(ragged.lengths)], dtype=torch.int32)
    return Packing(cumulative, max(ragged.lengths))


def _padding(
    plan: ElisionPlan, place: Place, kept: Rows, kept_shape: tuple[int, int]
) -> Tensor | None:
    is_padding = torch.ones(kept_shape[0] * kept_shape[1], dtype=torch.bool)
    is_padding[kept.row_N[kept.rank_N == place.rank]] = False
    return is_padding.view(kept_shape).T.contiguous() if bool(is_padding.any()) else None
