"""The slow, plain reference: every layer gathers, attends, scatters, one sample at a time.

Nothing here is shared with the fast path but the weights. Supports Llama, Mistral, Qwen2 and
Qwen2-VL decoders (RMSNorm, rotary positions, grouped queries, SwiGLU, sliding windows).

Shapes: B rows, T positions, K kept positions, H hidden, N heads, D size of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from regate_ds.algorithm.batch import IGNORE, TokenBatch
from regate_ds.algorithm.plan import ElisionPlan

Rotary = tuple[Tensor, Tensor]
"""cos and sin [T, D] of one sample's positions."""


def oracle_loss(
    host: nn.Module,
    embedded_BTH: Tensor,
    batch: TokenBatch,
    plan: ElisionPlan,
    gated: range,
    rotary_B: list[Rotary] | None = None,
) -> Tensor:
    """Summed loss of the kept targets of a micro-batch, each sample computed on its own.

    Of the plan are used the positions kept, those with a loss, and the weights of these.
    ``rotary_B``: for models whose positions are not 0, 1, 2... in each sample; one sample a row
    then.
    """
    total = embedded_BTH.new_zeros(())
    for sample in _samples(embedded_BTH, batch, plan, rotary_B):
        total = total + sample_loss(host, sample, gated)
    return total


def oracle_logits(
    host: nn.Module, embedded_BTH: Tensor, batch: TokenBatch, plan: ElisionPlan, gated: range
) -> list[tuple[Tensor, int]]:
    """The logits [V] at each kept target of a micro-batch, and the target."""
    return [
        (logits_V, target)
        for sample in _samples(embedded_BTH, batch, plan)
        for _, logits_V, target in sample_logits(host, sample, gated)
    ]


def _samples(
    embedded_BTH: Tensor,
    batch: TokenBatch,
    plan: ElisionPlan,
    rotary_B: list[Rotary] | None = None,
) -> Iterator[Sample]:
    scored = plan.label_position_L.tolist()
    weights = [1.0] * len(scored) if plan.weight_L is None else plan.weight_L.tolist()
    real, weight_of = set(plan.position_R.tolist()), dict(zip(scored, weights, strict=True))
    num_tokens = batch.labels_BT.shape[1]
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            positions = [t for t in range(num_tokens) if row[t] == s]
            kept = [i for i, t in enumerate(positions) if r * num_tokens + t in real]
            labels = {i: int(batch.labels_BT[r, positions[i]]) for i in kept}
            targets = {
                i: y for i, y in labels.items() if r * num_tokens + positions[i] in weight_of
            }
            assert IGNORE not in targets.values()
            yield Sample(
                embedded_BTH[r, positions],
                kept,
                targets,
                None if rotary_B is None else rotary_B[r],
                {i: weight_of[r * num_tokens + positions[i]] for i in targets},
            )


@dataclass(frozen=True)
class Sample:
    """One sample's embedded tokens, kept positions, and targets by position."""

    embedded_TH: Tensor
    kept: list[int]
    targets: dict[int, int]
    rotary: Rotary | None = None
    weights: dict[int, float] = field(default_factory=dict)
    """By position; 1 where there is none."""


def sample_loss(host: nn.Module, sample: Sample, gated: range) -> Tensor:
    """Summed loss of one sample's kept targets, each times its weight."""
    total = sample.embedded_TH.new_zeros(())
    for position, logits_V, target in sample_logits(host, sample, gated):
        loss = logits_V.logsumexp(0) - logits_V[target]
        total = total + sample.weights.get(position, 1.0) * loss
    return total


def sample_logits(
    host: nn.Module, sample: Sample, gated: range
) -> Iterator[tuple[int, Tensor, int]]:
    """The position, the logits [V] and the target of each of a sample's kept targets."""
    decoder = host.get_decoder()
    x_TH = sample.embedded_TH
    cos_TD, sin_TD = sample.rotary or _rotary(decoder, len(x_TH), x_TH.dtype)
    for number, layer in enumerate(decoder.layers):
        positions = sample.kept if number in gated else list(range(len(x_TH)))
        window = _window(decoder.config, number)
        hidden_KK = _hidden(positions, window)
        y_KH = _layer(layer, x_TH[positions], cos_TD[positions], sin_TD[positions], hidden_KK)
        rows = [x_TH[t] for t in range(len(x_TH))]
        for slot, position in enumerate(positions):
            rows[position] = y_KH[slot]
        x_TH = torch.stack(rows)
    for position, target in sample.targets.items():
        yield position, host.get_output_embeddings()(decoder.norm(x_TH[position])), target


def _rotary(decoder: nn.Module, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = decoder.rotary_emb.inv_freq.to(dtype)
    angles = torch.arange(length, dtype=dtype)[:, None] * frequencies[None]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _window(config, number: int) -> float:
    """How many positions a layer's attention reaches back, its own included."""
    types = getattr(config, "layer_types", None)
    slides = types is None or types[number] == "sliding_attention"
    size = getattr(config, "sliding_window", None)
    return size if slides and size is not None else math.inf


def _hidden(positions: list[int], window: float) -> Tensor:
    """True where a position (row) may not see another (column): later, or beyond the window."""
    return torch.tensor([[not 0 <= i - j < window for j in positions] for i in positions])


def _layer(
    layer: nn.Module, x_KH: Tensor, cos_KD: Tensor, sin_KD: Tensor, hidden_KK: Tensor
) -> Tensor:
    attended_KH = _attention(
        layer.self_attn, layer.input_layernorm(x_KH), cos_KD, sin_KD, hidden_KK
    )
    x_KH = x_KH + attended_KH
    mlp = layer.mlp
    h_KH = layer.post_attention_layernorm(x_KH)
    return x_KH + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h_KH)) * mlp.up_proj(h_KH))


def _attention(
    attention: nn.Module, h_KH: Tensor, cos_KD: Tensor, sin_KD: Tensor, hidden_KK: Tensor
) -> Tensor:
    num_kept, size = len(h_KH), attention.head_dim
    query = _rotate(attention.q_proj(h_KH).view(num_kept, -1, size), cos_KD, sin_KD)
    key = _rotate(attention.k_proj(h_KH).view(num_kept, -1, size), cos_KD, sin_KD)
    value = attention.v_proj(h_KH).view(num_kept, -1, size)
    per_group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        k, v = key[:, head // per_group], value[:, head // per_group]
        weights = (query[:, head] @ k.T / math.sqrt(size)).masked_fill(hidden_KK, -math.inf)
        heads.append(weights.softmax(dim=-1) @ v)
    return attention.o_proj(torch.cat(heads, dim=-1))


def _rotate(x_KND: Tensor, cos_KD: Tensor, sin_KD: Tensor) -> Tensor:
    first, second = x_KND.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_KND * cos_KD[:, None] + turned * sin_KD[:, None]
