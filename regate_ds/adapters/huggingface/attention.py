"""What bounds attention among kept tokens, for each attention implementation of transformers.

Boundaries come from the plan. transformers would infer them from gaps in position_ids, and elision
makes gaps; so kept rows never carry position_ids into attention.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.plan import ElisionPlan

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""transformers' names of explicit boundaries, given all together or not at all."""


def ungated_attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """What replaces the host's inputs of layers that see every token: mostly nothing.

    transformers 5.23 reads the bounds of packed samples off position_ids, but for flash_attention_2
    in micro-batches of a single row only: with more rows it attends across samples in silence.
    """
    if plan.is_packed and _implementation(host) == "flash_attention_2":
        return {"attention_mask": None, **_boundaries(plan.token_run_lengths, plan.kept_BK.device)}
    return {}


def attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Keyword arguments of a decoder layer that make its attention exact over the plan's slots.

    A row of one sample is causal with its padding at the end, so no mask is needed: real tokens
    come before the padding. Rows of several samples get explicit boundaries.
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
    """bool [B, 1, K, K]: the same sample, not later. Padding sees padding: no row is empty."""
    segment_BK = plan.segment_BK
    same_BKK = segment_BK[:, :, None] == segment_BK[:, None, :]
    return same_BKK.tril()[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def _boundaries(run_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Cumulative lengths of the runs in the flattened rows; padding is a run of its own."""
    ends = [0, *accumulate(run_lengths)]
    cumulative = torch.tensor(ends, dtype=torch.int32, device=device)
    longest = max(run_lengths)
    return dict(zip(BOUNDARIES, (cumulative, cumulative, longest, longest), strict=True))
