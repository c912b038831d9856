"""Merged steps in Megatron-core: a rank's share of a plan whose slots are patches.

The tokens of a patch may lie on several ranks: each goes, in the one exchange that elision has too,
to the rank that holds the patch, and the mean is taken there. All layers and all edges between
stages then see patches.

Shapes: B rows, T positions, K slots of a row, S = B * K slots, M positions of a slot at most, N
slots of this rank, U slots that predict something, L targets, P places of targets.
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
    route_to_head,
    slots_without_token,
)
from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.parallel.resharding import Route, Rows, SequenceCut, make_route


def require_mergeable_chunks(chunks: Sequence[Any], *, ragged: bool) -> None:
    """Refuse, by ValueError, chunks or rows in which tokens cannot be one; all ranks alike."""
    gpt = chunks[0]
    faults = {
        "padded rows alone hold patches; attach with row_format='padded'": ragged,
        "position_embedding_type='mrope' gives tokens several numbers; use 'rope' or 'yarn'": (
            gpt.position_embedding_type == "mrope"
        ),
        "the decoder adds features of images between its layers; use another model": (
            num_additions(gpt) > 0
        ),
    }
    for fault in (fault for fault, has in faults.items() if has):
        raise ValueError(f"merged steps: {fault}, or set merge.steps=0")


def localise_patches(plan: ElisionPlan, place: Place) -> LocalPlan:
    """Return a merged plan's share on the rank at ``place``."""
    patches = plan.patches
    assert patches is not None
    num_rows, num_slots = plan.kept_BK.shape
    slot_SN = _spread(num_slots, num_rows, place)
    mine_N = (slot_SN.rank_N == place.rank).nonzero().squeeze(1)
    kept_shape = num_slots // place.cut.size, num_rows
    held_K = SequenceCut(place.context_size).held(num_slots)[place.context_rank]
    context_L = slot_SN[plan.label_slot_L].rank_N // place.sequence_size
    here_L = (context_L == place.context_rank).nonzero().squeeze(1)
    slot_U, number_L = plan.label_slot_L[here_L].unique_consecutive(return_inverse=True)
    num_head_rows, head = route_to_head(slot_SN[slot_U], place)
    # A slot has all its targets on one rank, so that their places in it are those of the plan.
    cell_L = number_L * patches.size + patches.cell_L[here_L] % patches.size
    targets_P = plan.targets_L.new_zeros(num_head_rows * patches.size)
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
        targets_P=targets_P.index_copy(0, cell_L, plan.targets_L[here_L]),
        context_L=context_L,
        num_targets=len(here_L),
        weight_P=None,
        members=Members(
            _shares(patches.is_member_SM[mine_N], slot_SN.row_N[mine_N], math.prod(kept_shape)),
            cell_L,
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
