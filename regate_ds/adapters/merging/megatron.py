"""Merged steps in Megatron-core: a rank's share of a plan whose slots are patches.

The tokens of a patch may lie on several ranks: each goes, in the one exchange that elision has too,
to the rank that holds the patch, and the mean is taken there. All layers and all edges between
stages then see patches.

Shapes: B rows, T positions, K slots of a row, S = B * K slots, M positions of a slot at most, N
slots of this rank, U slots that predict something, L targets, P targets with padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regate_ds.adapters.megatron.deepstack import num_additions
from regate_ds.adapters.megatron.local.members import Members
from regate_ds.adapters.megatron.local.place import Place
from regate_ds.adapters.megatron.local.plan import (
    LocalPlan,
    padded,
    route_to_head,
    slots_without_token,
)
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.parallel.resharding import Route, Rows, SequenceCut, make_route

_OFF = "set merge.steps=0"


def require_mergeable_chunks(chunks: Sequence[Any], *, ragged: bool) -> None:
    """Refuse, by ValueError, chunks or rows in which tokens cannot be one."""
    gpt = chunks[0]
    fused = [gpt for gpt in chunks if getattr(gpt, "fuse_linear_cross_entropy", False)]
    faults = {
        "row_format='ragged', and patches are laid out in padded rows alone": ragged,
        "position_embedding_type='mrope', which gives tokens several numbers": (
            gpt.position_embedding_type == "mrope"
        ),
        "image features that the decoder adds between its layers": num_additions(gpt) > 0,
        "cross_entropy_fusion_impl='linear', a head without logits": bool(fused),
    }
    for fault in (fault for fault, has in faults.items() if has):
        raise ValueError(f"merged steps: the model has {fault}; {_OFF}, or change this")


def localise_patches(plan: ElisionPlan, place: Place) -> LocalPlan:
    """Return a merged plan's share on the rank at ``place``."""
    patches = plan.patches
    assert patches is not None
    num_rows, num_slots = plan.kept_BK.shape
    slot_SN = _spread(num_slots, num_rows, place)
    mine_N = (slot_SN.rank_N == place.rank).nonzero().squeeze(1)
    kept_shape = num_slots // place.cut.size, num_rows
    held_K = SequenceCut(place.context_size).held(num_slots)[place.context_rank]
    target_slot_L = patches.predicts_U[patches.cell_L // patches.size]
    context_L = slot_SN[target_slot_L].rank_N // place.sequence_size
    here_L = (context_L == place.context_rank).nonzero().squeeze(1)
    slot_U, number_L = target_slot_L[here_L].unique_consecutive(return_inverse=True)
    num_head_rows, head = route_to_head(slot_SN[slot_U], place)
    num_targets = max(1, len(here_L))
    return LocalPlan(
        plan=plan,
        full_shape=(patches.row_length // place.cut.size, num_rows),
        cut=(patches.row_length,) if place.context_size > 1 else None,
        kept_shape=kept_shape,
        gather=_gather(plan, place, slot_SN),
        elided_N=None,
        rotary_position=patches.place_BK[:, held_K].T.contiguous(),
        source=patches.member_SM[:, 0].view(num_rows, num_slots)[:, held_K].T.contiguous(),
        packing=None,
        padding_BK=slots_without_token(plan, place, slot_SN[plan.slot_R], kept_shape),
        head=head,
        targets_P=padded(plan.targets_L[here_L], num_targets),
        context_L=context_L,
        num_targets=len(here_L),
        weight_P=None,
        members=Members(
            _shares(patches.is_member_SM[mine_N], slot_SN.row_N[mine_N], math.prod(kept_shape)),
            padded(number_L, num_targets),
            num_head_rows,
        ),
    )


def _spread(length: int, num_rows: int, place: Place) -> Rows:
    """Return where each place of rows of a length lies, flat in [B * length]: rank and row."""
    rank_T, index_T = place.cut.owners(length)
    row_B1 = torch.arange(num_rows)[:, None]
    return Rows(rank_T.repeat(num_rows), (index_T * num_rows + row_B1).flatten())


def _gather(plan: ElisionPlan, place: Place, slot_SN: Rows) -> Route:
    """Return the route of each position to its place among those of its slot."""
    patches = plan.patches
    assert patches is not None
    slot_P, nth_P = patches.is_member_SM.nonzero().unbind(1)
    position_TN = _spread(patches.row_length, len(plan.kept_BK), place)
    before = position_TN[patches.member_SM[slot_P, nth_P]]
    after = Rows(slot_SN.rank_N[slot_P], slot_SN.row_N[slot_P] * patches.size + nth_P)
    return make_route(before, after, place.rank, place.cut.size)


def _shares(is_member_NM: Tensor, row_N: Tensor, num_rows: int) -> Tensor:
    """Return each position's share in its slot's mean, by this rank's rows."""
    share_NM = is_member_NM / is_member_NM.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.zeros(num_rows, share_NM.shape[1]).index_copy(0, row_N, share_NM)
