"""A stand-in for flash-attention's two functions in plain torch, put where transformers looks.

The kernels themselves need a GPU and are not run here: what is tested is which boundaries reach
them through transformers, and that the results under these boundaries are right.

Shapes: B rows, T tokens of a row, P tokens of all rows together, N heads, D size of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as host


@dataclass
class PlainFlash:
    """Records the boundaries of every call; None where a call had none."""

    boundaries: list[list[int] | None] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = (self.batched, self.variable, None, None, None)
        monkeypatch.setattr(host, "_lazy_imports", lambda *args, **kwargs: functions)
        monkeypatch.setattr(host, "_loaded_implementation", None)

    def batched(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        dropout_p: float,
    ) -> Tensor:
        """[B, T, N, D]; every row is one sequence."""
        assert causal
        assert dropout_p == 0.0
        self.boundaries.append(None)
        rows = [_attend(*row, scale=softmax_scale) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def variable(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        softmax_scale: float,
        dropout_p: float,
    ) -> Tensor:
        """[P, N, D]; sequences lie one after the other, as the kernel demands them."""
        assert causal
        assert dropout_p == 0.0
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        ends = cu_seqlens_q.tolist()
        assert ends == cu_seqlens_k.tolist()
        lengths = [end - start for start, end in zip(ends, ends[1:])]
        assert ends[0] == 0
        assert ends[-1] == len(q)
        assert min(lengths) > 0
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        self.boundaries.append(ends)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_attend(*part, scale=softmax_scale) for part in parts])


def _attend(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, *, scale: float) -> Tensor:
    """Causal attention of one sequence with grouped queries."""
    per_group = q_TND.shape[1] // k_TND.shape[1]
    k_TND, v_TND = (x.repeat_interleave(per_group, dim=1) for x in (k_TND, v_TND))
    scores_NTT = torch.einsum("qnd,knd->nqk", q_TND, k_TND) * scale
    later = torch.ones(scores_NTT.shape[1:], dtype=torch.bool).triu(1)
    weights_NTT = scores_NTT.masked_fill(later, -math.inf).softmax(dim=-1)
    return torch.einsum("nqk,knd->qnd", weights_NTT, v_TND)


def uses_flash(model: nn.Module) -> nn.Module:
    """Choose the implementation past the check that the library is installed."""
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    return model
