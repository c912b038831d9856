"""A plan's share on one rank of the replica: which rows the rank holds, moves and scores.

Everything here is computed from the plan and the rank's place, without a collective.

Shapes: B rows, T positions, K slots, R real slots, L targets, P targets with padding, N rows of any
kind. Megatron's tensors are [S, B, H], so index i of row b is the flattened row i * B + b.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regate_ds.adapters.megatron.local.place import Place, cut_lengths
from regate_ds.adapters.megatron.local.ragged import Packing, Ragged, lay_out, packing_of
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.parallel.resharding import Route, Rows, SequenceCut, make_route

if TYPE_CHECKING:
    from regate_ds.adapters.megatron.local.members import Members


@dataclass(frozen=True)
class LocalPlan:
    """One rank's share of a micro-batch's plan."""

    plan: ElisionPlan
    full_shape: tuple[int, int]
    """[S, B]: shape of this rank's part of the rows that ungated layers see."""

    cut: tuple[int, ...] | None
    """Lengths of what context ranks cut of these rows, each by itself; None if there is one."""

    kept_shape: tuple[int, int]
    """[S, B]: shape of this rank's part of the rows that gated layers see."""

    gather: Route | None
    """Route from the full rows to the kept rows; None if the plan moves no rows."""

    elided_N: Tensor | None
    """Rows of this rank that go around the gated layers, padding of the full rows included; None if
    the plan moves no rows, or if the full rows are never restored."""

    rotary_position: Tensor
    """int64 [S, B]: original positions of this context rank's kept slots. Ragged rows have the
    slots of all context ranks, of which Megatron takes this rank's part."""

    source: Tensor
    """int64 [S, B]: where these slots lie in the micro-batch [B, T], flat; 0 at padding."""

    packing: Packing | None
    """Bounds of the samples in ragged rows; None for padded rows, or if no row moves."""

    padding_BK: Tensor | None
    """bool [B, S]: True at padding slots of this rank; None if there are none."""

    head: Route
    """Route from the decoder's output to the rows that have a target."""

    targets_P: Tensor
    """Targets of this context rank, padded to a multiple of the tensor ranks that share them; in a
    merged step M places for each row of the head, with 0 where a patch has fewer targets."""

    context_L: Tensor
    """The context rank that holds each of the plan's targets; stays in CPU memory."""

    num_targets: int
    """Number of targets of this context rank."""

    weight_P: Tensor | None
    """Weights of the targets here, then 0; None if every target counts 1."""

    members: Members | None = None
    """Of what the rows are made in a merged step, in which all layers are gated; else None."""

    @property
    def moves_rows(self) -> bool:
        return self.gather is not None

    @property
    def num_head_rows(self) -> int:
        return len(self.targets_P) if self.members is None else self.members.num_head_rows

    def of_targets(self, x_P: Tensor) -> Tensor:
        """Return the values at the targets of this context rank."""
        return x_P[: self.num_targets] if self.members is None else x_P[self.members.cell_L]

    def to(self, device: torch.device | str) -> LocalPlan:
        """Return a copy whose tensors, except ``context_L``, are on the device."""
        values = {k: v for k, v in vars(self).items() if k != "context_L"}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | Route)}
        if self.packing is not None:
            moved["packing"] = self.packing.to(device)
        if self.members is not None:
            moved["members"] = self.members.to(device)
        return replace(self, **moved)


def localise(plan: ElisionPlan, place: Place) -> LocalPlan:
    """Return the plan's share on the rank at ``place``."""
    full_RN = _full_rows(plan.position_R, plan, place)
    ragged = lay_out(plan, place) if place.ragged else None
    kept_RN, kept_shape = _kept_rows(plan, place, ragged)
    elides = plan.moves_rows
    gather = make_route(full_RN, kept_RN, place.rank, place.cut.size) if elides else None
    packed_end = elides and not place.ends_early
    real_L = torch.searchsorted(plan.slot_R, plan.label_slot_L)
    targets_RN = kept_RN[real_L] if packed_end else _full_rows(plan.label_position_L, plan, place)
    context_L = targets_RN.rank_N // place.sequence_size
    here_L = (context_L == place.context_rank).nonzero().squeeze(1)
    num_head_rows, head = route_to_head(targets_RN[here_L], place)
    targets_P = padded(plan.targets_L[here_L], num_head_rows)
    full_shape = plan.num_tokens // place.cut.size, len(plan.kept_BK)
    return LocalPlan(
        plan=plan,
        full_shape=full_shape,
        cut=cut_lengths(plan, place) if place.context_size > 1 else None,
        kept_shape=kept_shape if elides else full_shape,
        gather=gather,
        elided_N=_elided(gather, math.prod(full_shape), place),
        rotary_position=_rotary_position(plan, place, ragged),
        source=_source(plan, place, ragged),
        packing=packing_of(ragged, place) if elides and ragged is not None else None,
        padding_BK=slots_without_token(plan, place, kept_RN, kept_shape) if elides else None,
        head=head,
        targets_P=targets_P,
        context_L=context_L,
        num_targets=len(here_L),
        weight_P=_weights(plan, here_L, len(targets_P)),
    )


def _weights(plan: ElisionPlan, here_L: Tensor, length: int) -> Tensor | None:
    """Return the weights of this context rank's targets, padded with 0."""
    if plan.weight_L is None:
        return None
    return padded(plan.weight_L[here_L], length)


def _elided(gather: Route | None, num_rows: int, place: Place) -> Tensor | None:
    """Return the full rows of this rank that the gather does not send."""
    if gather is None or not place.ends_early:
        return None
    is_elided = torch.ones(num_rows, dtype=torch.bool)
    is_elided[gather.sent_N] = False
    return is_elided.nonzero().squeeze(1)


def _full_rows(position_N: Tensor, plan: ElisionPlan, place: Place) -> Rows:
    """Return where flat positions in [B * T] lie before the gate: rank and row."""
    rank_T, index_T = place.cut.owners(*cut_lengths(plan, place))
    row_N, t_N = position_N // plan.num_tokens, position_N % plan.num_tokens
    return Rows(rank_T[t_N], index_T[t_N] * len(plan.kept_BK) + row_N)


def _kept_rows(
    plan: ElisionPlan, place: Place, ragged: Ragged | None
) -> tuple[Rows, tuple[int, int]]:
    """Return where the real slots lie after the gate, and the [S, B] that this rank then holds."""
    if ragged is not None:
        rows = Rows(*place.cut.owners(*ragged.lengths))[ragged.index_R]
        return rows, (sum(ragged.lengths) // place.cut.size, 1)
    num_rows, num_slots = plan.kept_BK.shape
    rank_K, index_K = place.cut.owners(num_slots)
    row_R, k_R = plan.slot_R // num_slots, plan.slot_R % num_slots
    shape = num_slots // place.cut.size, num_rows
    return Rows(rank_K[k_R], index_K[k_R] * num_rows + row_R), shape


def route_to_head(rows: Rows, place: Place) -> tuple[int, Route]:
    """Divide rows that the head reads anew over the tensor ranks, at least one row for each.

    Returns their number with padding, and this rank's route from its decoder output to these rows.
    """
    size, num_rows = place.sequence_size, len(rows.row_N)
    length = max(1, math.ceil(num_rows / size)) * size
    rank_P, index_P = SequenceCut(1, size).owners(length)
    before = Rows(rows.rank_N % size, rows.row_N)
    after = Rows(rank_P[:num_rows], index_P[:num_rows])
    return length, make_route(before, after, place.sequence_rank, size)


def padded(x_N: Tensor, length: int) -> Tensor:
    """Return the tensor with zeros behind it, up to a length."""
    return torch.nn.functional.pad(x_N, (0, length - len(x_N)))


def _rotary_position(plan: ElisionPlan, place: Place, ragged: Ragged | None) -> Tensor:
    """Return each kept slot's original position, counted from the start of its sample if ragged."""
    if ragged is None:
        held_K = SequenceCut(place.context_size).held(plan.num_slots)[place.context_rank]
        return plan.kept_BK[:, held_K].T.contiguous()
    first_R = plan.sample_starts.repeat_interleave(ragged.kept)
    position_P = torch.zeros(sum(ragged.lengths), dtype=torch.long)
    position_P[ragged.index_R] = plan.position_R - first_R
    return position_P[:, None]


def _source(plan: ElisionPlan, place: Place, ragged: Ragged | None) -> Tensor:
    """Return where each kept slot lies in the micro-batch, flat; 0 at padding."""
    if ragged is None:
        source_N = torch.zeros(plan.kept_BK.numel(), dtype=torch.long)
        source_N[plan.slot_R] = plan.position_R
        held_K = SequenceCut(place.context_size).held(plan.num_slots)[place.context_rank]
        return source_N.view(plan.kept_BK.shape)[:, held_K].T.contiguous()
    source_P = torch.zeros(sum(ragged.lengths), dtype=torch.long)
    source_P[ragged.index_R] = plan.position_R
    return source_P[:, None]


def slots_without_token(
    plan: ElisionPlan, place: Place, kept: Rows, kept_shape: tuple[int, int]
) -> Tensor | None:
    """Return bool [B, S]: True at this rank's slots without a token; None if there are none."""
    is_padding = torch.ones(kept_shape[0] * kept_shape[1], dtype=torch.bool)
    is_padding[kept.row_N[kept.rank_N == place.rank]] = False
    return is_padding.view(kept_shape).T.contiguous() if bool(is_padding.any()) else None
