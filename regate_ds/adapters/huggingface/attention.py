"""Bound attention among kept tokens, for each attention implementation of transformers.

The boundaries of samples come from the plan. transformers would infer them from gaps in
position_ids, and elision makes such gaps; so position_ids never reach the attention of kept rows.

Shapes: B rows, K slots.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Names that transformers gives to explicit boundaries; a layer gets all of them or none."""


def ungated_attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Return keyword arguments that replace the host's in layers that see every token.

    They are empty except for packed rows under flash_attention_2. There transformers 5.23 infers
    the bounds of samples from position_ids only if the micro-batch is a single row; with more rows
    it attends across samples without an error.
    """
    if plan.is_packed and _implementation(host) == "flash_attention_2":
        return {"attention_mask": None, **_boundaries(plan.token_run_lengths, plan.kept_BK.device)}
    return {}


def attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Return keyword arguments of a decoder layer that make attention exact over the plan's slots.

    A row of one sample has its padding at the end. Causal attention then hides the padding from
    real tokens, so no mask is needed. Rows of several samples get explicit boundaries.
    """
    implementation = _implementation(host)
    if implementation == "flash_attention_2":
        bounds = _boundaries(plan.run_lengths, plan.kept_BK.device) if plan.is_packed else {}
        return {"attention_mask": None, **bounds}
    if implementation == "sdpa" and not plan.is_packed:
        return {"attention_mask": None}
    allowed = _allowed(plan)
    if implementation == "eager":
        return {"attention_mask": _additive(allowed, next(host.parameters()).dtype)}
    return {"attention_mask": allowed}


def _implementation(host: nn.Module) -> str:
    return host.get_decoder().config._attn_implementation


def _allowed(plan: ElisionPlan) -> Tensor:
    """Return bool [B, 1, K, K]: True where a slot may attend to a slot of its sample, not later.

    Padding attends to padding, so that no row of the mask is empty.
    """
    segment_BK = plan.segment_BK
    same_BKK = segment_BK[:, :, None] == segment_BK[:, None, :]
    return same_BKK.tril()[:, None]


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


def at_kept(kwargs: dict[str, Any], plan: ElisionPlan) -> dict[str, Any]:
    """Return the layer's inputs at kept positions.

    The mask and the boundaries are left out, because ``attention_inputs`` gives those of the plan.
    """
    replaced = {"attention_mask", "position_ids", "position_embeddings", *BOUNDARIES}
    rotary = tuple(_rotary_at_kept(x, plan) for x in kwargs["position_embeddings"])
    return {
        **{k: v for k, v in kwargs.items() if k not in replaced},
        "position_ids": None,
        "position_embeddings": rotary,
    }


def _rotary_at_kept(x: Tensor, plan: ElisionPlan) -> Tensor:
    """Select the rotary embedding of kept positions: [..., B or 1, T, D] -> [..., B, K, D].

    Kept tokens thus have their original positions.
    """
    *lead, _, num_tokens, size = x.shape
    num_rows, num_slots = plan.kept_BK.shape
    x_BTD = x.expand(*lead, num_rows, num_tokens, size)
    index = plan.kept_BK.unsqueeze(-1).expand(*lead, num_rows, num_slots, size)
    return x_BTD.gather(-2, index)
