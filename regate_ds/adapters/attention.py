"""What bounds attention among kept tokens, for each attention implementation of transformers.

Boundaries come from the plan. transformers would infer them from gaps in position_ids, and elision
makes gaps; so kept rows never carry position_ids into attention.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from regate_ds.algorithm.select import ElisionPlan


def attention_inputs(plan: ElisionPlan, host: nn.Module) -> dict[str, Any]:
    """Keyword arguments of a decoder layer that make its attention exact over the plan's slots.

    A row of one sample is causal with its padding at the end, so no mask is needed: real tokens
    come before the padding. Rows of several samples get explicit boundaries.
    """
    implementation = host.get_decoder().config._attn_implementation
    if implementation == "flash_attention_2":
        return {"attention_mask": None, **(_lengths(plan) if plan.is_packed else {})}
    if implementation == "sdpa" and not plan.is_packed:
        return {"attention_mask": None}
    allowed = _allowed(plan)
    if implementation == "eager":
        return {"attention_mask": _additive(allowed, next(host.parameters()).dtype)}
    return {"attention_mask": allowed}


def _allowed(plan: ElisionPlan) -> Tensor:
    """bool [B, 1, K, K]: the same sample, not later. Padding sees padding: no row is empty."""
    segment_BK = plan.segment_BK
    same_BKK = segment_BK[:, :, None] == segment_BK[:, None, :]
    return same_BKK.tril()[:, None]


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


def _lengths(plan: ElisionPlan) -> dict[str, Any]:
    """Cumulative lengths of the runs in the flattened rows; padding is a run of its own."""
    ends = [0, *accumulate(plan.run_lengths)]
    cumulative = torch.tensor(ends, dtype=torch.int32, device=plan.kept_BK.device)
    longest = max(plan.run_lengths)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }
