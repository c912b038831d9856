"""Plain replacements of Transformer Engine's modules: slow, for tests and trials only.

The norm supports sequence parallelism; the attention supports packed sequences and context
parallelism.

Shapes: S positions of a query, T positions of keys, B rows, N heads, D size of a head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Norm(nn.Module):
    """RMSNorm whose weight tells Megatron to sum its gradient under sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class WholeLinear(nn.Module):
    """A linear layer that each tensor rank has whole, as Transformer Engine's duplicated ones.

    Under sequence parallelism a rank has the gradient of its own rows; Megatron sums them.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(output_size, input_size))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class Attention(nn.Module):
    """Attention with packed sequences, causal unless it is built with AttnMaskType.no_mask; keys
    are gathered over context ranks."""

    def __init__(
        self,
        config: Any,
        attn_mask_type: Any = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.config = config
        from megatron.core import parallel_state
        from megatron.core.transformer.enums import AttnMaskType

        self.is_causal = attn_mask_type is not AttnMaskType.no_mask
        self.scale = softmax_scale
        # A vision tower has whole images on each context rank, and says so.
        divided = config.context_parallel_size > 1
        self.context = parallel_state.get_context_parallel_group() if divided else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: Any = None,
        **__: Any,
    ) -> Tensor:
        is_packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if is_packed:
            query, key, value = (x[:, None] for x in (query, key, value))
        size, rank = (1, 0) if self.context is None else (self.context.size(), self.context.rank())
        length = size * query.shape[0]
        bounds = _places(packed_seq_params) if is_packed else [0, length]
        # Positions after the last sample are padding.
        positions = _zigzag([*bounds, length], size)
        if self.context is not None:
            key, value = (_AllGather.apply(x, self.context) for x in (key, value))
        sample = torch.bucketize(torch.arange(length), torch.tensor(bounds[1:]), right=True)
        at_query, at_key = positions[rank], positions.reshape(-1)
        seen = sample[at_key][None] == sample[at_query][:, None]
        if self.is_causal:
            seen &= at_key[None] <= at_query[:, None]
        out = _attend(query, key, value, seen, self.scale or 1 / math.sqrt(query.shape[-1]))
        return out[:, 0] if is_packed else out


def _places(packed: Any) -> list[int]:
    """Return where the samples of packed rows lie: padding in a sample comes after its tokens."""
    padded = packed.cu_seqlens_q_padded
    return (packed.cu_seqlens_q if padded is None else padded).tolist()


def _zigzag(bounds: list[int], size: int) -> Tensor:
    """Return the positions, in the whole sequence, that each of ``size`` ranks holds [size, S]."""
    held: list[list[int]] = [[] for _ in range(size)]
    for start, end in zip(bounds, bounds[1:]):
        half = (end - start) // (2 * size)
        for rank in range(size) if size > 1 else ():
            held[rank] += range(start + rank * half, start + (rank + 1) * half)
            held[rank] += range(end - (rank + 1) * half, end - rank * half)
    return torch.tensor(held) if size > 1 else torch.arange(bounds[-1])[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Compute attention: query [S, B, N, D] -> [S, B, N * D], where D may be another of values.

    seen: bool [S, T], True where a query attends to a key.
    """
    length, rows, heads, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    out = torch.einsum("bnst,tbnd->sbnd", scores.masked_fill(~seen, -math.inf).softmax(-1), value)
    return out.reshape(length, rows, -1)


class _AllGather(torch.autograd.Function):
    """Gather the rows of all ranks; the backward pass sums the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size())[ctx.group.rank()], None


def layer_spec(spec: Any, *, own_attention: bool) -> Any:
    """Put the norm of this file into a layer spec, and its attention if ``own_attention``."""
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    if own_attention:
        parts.self_attention.submodules.core_attention = Attention
    return spec
