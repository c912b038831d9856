"""Bound attention among kept tokens, for each attention implementation of transformers.

The boundaries of samples come from the plan. transformers would infer them from gaps in
position_ids, and elision makes such gaps; so position_ids never reach the attention of kept rows.

Where attention is causal and unbounded, the mask follows from the plan alone. Where the host's own
mask says more (a window, chunks, a prefix or an image whose tokens see each other), that mask is
taken at kept rows and columns.

Shapes: B rows, T positions, K slots.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan
from regate_ds.data.joined import BOUNDARIES


def ungated_attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Return keyword arguments that replace the host's in layers that see every token.

    They are empty except for packed rows under flash_attention_2. There transformers 5.23 infers
    the bounds of samples from position_ids only if the micro-batch is a single row; with more rows
    it attends across samples without an error.
    """
    if plan.is_packed and attention_of(host) == "flash_attention_2":
        return {"attention_mask": None, **_boundaries(plan.token_run_lengths, plan.kept_BK.device)}
    return {}


def attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Return keyword arguments of a decoder layer that make attention exact over the plan's slots.

    A row of one sample has its padding at the end. Causal attention then hides the padding from
    real tokens, so no mask is needed. Rows of several samples get explicit boundaries.
    """
    implementation = attention_of(host)
    if implementation == "flash_attention_2":
        bounds = _boundaries(plan.run_lengths, plan.kept_BK.device) if plan.is_packed else {}
        return {"attention_mask": None, **bounds}
    if implementation == "sdpa" and not plan.is_packed:
        return {"attention_mask": None}
    allowed = _same_sample(plan).tril()
    if implementation == "eager":
        return {"attention_mask": _additive(allowed, next(host.parameters()).dtype)}
    return {"attention_mask": allowed}


def attention_of(host: Any) -> str:
    """Return the decoder's attention implementation: sdpa, eager or flash_attention_2."""
    return host.get_decoder().config._attn_implementation


def own_mask_at_kept(mask: Tensor, plan: ElisionPlan) -> Tensor:
    """Return a host's mask [B or 1, heads or 1, T, T] at kept rows and columns, [B, ..., K, K].

    It holds booleans (True may be seen) or numbers to add to the scores. Samples of one row stay
    apart, and padding sees padding alone, so that no row of the mask is empty.
    """
    column_BhKK = plan.kept_BK[:, None, None, :].expand(-1, mask.shape[1], plan.num_slots, -1)
    kept_BhKK = mask_at_kept_queries(mask, plan).gather(3, column_BhKK)
    yes, no = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    is_padding_BK = plan.segment_BK < 0
    both_padding = (is_padding_BK[:, :, None] & is_padding_BK[:, None, :])[:, None]
    return kept_BhKK.masked_fill(~_same_sample(plan), no).masked_fill(both_padding, yes)


def mask_at_kept_queries(mask: Tensor | None, plan: ElisionPlan) -> Tensor:
    """Return a host's mask [B or 1, heads or 1, T, T] at kept rows, [B, ..., K, T].

    None is causal attention in rows of one sample. Slots of padding see what position 0 sees.
    """
    if mask is None:
        key_T = torch.arange(plan.num_tokens, device=plan.kept_BK.device)
        return (plan.kept_BK[:, :, None] >= key_T)[:, None]
    row_BhKT = plan.kept_BK[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
    return mask.expand(len(plan.kept_BK), -1, -1, -1).gather(2, row_BhKT)


def _same_sample(plan: ElisionPlan) -> Tensor:
    """Return bool [B, 1, K, K]: True between slots of one sample, and between those of padding."""
    segment_BK = plan.segment_BK
    return (segment_BK[:, :, None] == segment_BK[:, None, :])[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as numbers to add to attention scores: 0 or the lowest finite value."""
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def _boundaries(run_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return cumulative lengths of the runs in the flattened rows; padding is its own run."""
    ends = [0, *accumulate(run_lengths)]
    cumulative = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = max(run_lengths)
    return dict(zip(BOUNDARIES, (cumulative, cumulative, longest, longest), strict=True))
