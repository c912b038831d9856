"""The rotary angles of kept slots, for each kind of positions that a GPTModel may have.

The host computes its own angles for the rows of ungated layers, and cuts them over context ranks.
Kept slots are divided over context ranks anew, so their angles are taken from the whole table.

Shapes: B rows, T positions, S slots of this context rank, D values of an angle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from regate_ds.adapters.megatron.local.plan import LocalPlan
from regate_ds.parallel.resharding import SequenceCut


class _Alone:
    """Stands for a context group of one rank: the host then cuts nothing off the table."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _by_position(gpt: Any, local: LocalPlan, _: Tensor | None) -> Tensor:
    """One axis: positions count from the start of a sample."""
    table = gpt.rotary_pos_emb.get_emb(local.plan.num_tokens)
    return table[:, 0, 0][local.rotary_position]


def _by_scaled_position(gpt: Any, local: LocalPlan, _: Tensor | None) -> Tensor:
    """One axis with yarn's frequencies; attention itself reads the factor of sine and cosine."""
    table, _ = gpt.rotary_pos_emb.get_emb(local.plan.num_tokens)
    return table[:, 0, 0][local.rotary_position]


def _by_axes(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> Tensor:
    """Time, height and width, which the model is given for every position."""
    table_TB1D = gpt.rotary_pos_emb(position_ids, gpt.mrope_section, cp_group=_Alone())
    return table_TB1D[:, :, 0].transpose(0, 1).flatten(0, 1)[local.source]


def _by_interleaved_axes(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> Tensor:
    """The same axes in Megatron-Bridge's table for Qwen3-VL.

    Its attention takes the angles of its own context rank, of ragged rows, too.
    """
    table = gpt.rotary_pos_emb
    was_cut, table.is_thd_format = table.is_thd_format, True
    try:
        # It cuts nothing for context ranks if it is told that rows are packed.
        table_TB1D = table(position_ids, gpt.mrope_section)
    finally:
        table.is_thd_format = was_cut
    angles = table_TB1D[:, :, 0].transpose(0, 1).flatten(0, 1)[local.source]
    return angles if local.packing is None else angles[local.packing.held_S]


def require_one_axis(gpt: Any) -> None:
    """Refuse, by ValueError, packed rows under context parallelism where positions have axes.

    The host's table for axes cuts whole rows in zigzag, where attention cuts each sample.
    """
    if gpt.position_embedding_type == "mrope":
        raise ValueError(
            "the model is called with packed rows (packed_seq_params.qkv_format='thd'), which "
            "position_embedding_type='mrope' does not allow with context_parallel_size="
            f"{gpt.config.context_parallel_size}; give one sample a row"
        )


def whole_positions(
    gpt: Any, local: LocalPlan, position_ids: Tensor | None, context: ProcessGroup | None
) -> Tensor | None:
    """Return the positions that the model was called with, of whole rows.

    Collective over context ranks where the model was called with those of its own rank only, as
    Megatron-Bridge's Qwen3-VL is. ValueError for a call without the positions that the model's
    angles are made of.
    """
    if gpt.position_embedding_type != "mrope":
        return position_ids
    num_rows, num_tokens = len(local.plan.kept_BK), local.plan.num_tokens
    expected = (3, num_rows, num_tokens)
    found = None if position_ids is None else tuple(position_ids.shape)
    if context is not None and getattr(gpt.rotary_pos_emb, "is_thd_format", False):
        size = dist.get_world_size(context)
        if position_ids is not None and found == (3, num_rows, num_tokens // size):
            return _joined(position_ids, size, context)
    if found != expected:
        raise ValueError(
            f"the model is called with position_ids {found}, but position_embedding_type='mrope' "
            f"needs {expected} [3, rows, positions] on every stage; with context parallelism, too, "
            "of whole rows"
        )
    return position_ids


def _joined(position_ids: Tensor, size: int, context: ProcessGroup) -> Tensor:
    """Return whole rows of what context ranks hold in zigzag."""
    parts = [torch.empty_like(position_ids) for _ in range(size)]
    dist.all_gather(parts, position_ids.contiguous(), group=context)
    held_T = torch.cat(SequenceCut(size).held(size * position_ids.shape[2]))
    return torch.cat(parts, dim=2)[:, :, held_T.argsort().to(position_ids.device)]


Angles = Callable[[Any, LocalPlan, Tensor | None], Tensor]
"""Returns the angles [S, B, D] of kept slots."""

KINDS: dict[str, dict[str, Angles]] = {
    "rope": {"RotaryEmbedding": _by_position},
    "yarn": {"YarnRotaryEmbedding": _by_scaled_position},
    "mrope": {
        "MultimodalRotaryEmbedding": _by_axes,
        "Qwen3VLMultimodalRotaryEmbedding": _by_interleaved_axes,
    },
}
"""By ``position_embedding_type`` and the class of the rotary table: one of another class may mean
something else."""


def kept_angles(gpt: Any, local: LocalPlan, position_ids: Tensor | None) -> Tensor | None:
    """Return the angles [S, B, 1, D] of this context rank's kept slots; None if the model has none,
    or has latent attention, which has its own (``latent.py``).

    Ragged rows are one row of the slots of all context ranks, of which the host takes its part.
    position_ids: what the model was called with.
    """
    tables = KINDS.get(gpt.position_embedding_type)
    if tables is None or gpt.config.multi_latent_attention:
        return None
    angles = tables[type(gpt.rotary_pos_emb).__name__]
    return angles(gpt, local, position_ids).unsqueeze(2)
