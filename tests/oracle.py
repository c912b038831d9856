"""The slow, plain reference: every layer gathers, attends, scatters, one sample at a time.

Nothing here is shared with the fast path but the weights. Supports Llama, Mistral and Qwen2
decoders (RMSNorm, rotary positions, grouped queries, SwiGLU), with 1-D positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def decoder_losses(
    host: nn.Module,
    embedded_TH: Tensor,
    *,
    kept: list[int],
    gated: range,
    labels: dict[int, int],
) -> Tensor:
    """Summed loss of one sample whose kept positions are ``kept``; labels: position -> target."""
    decoder = host.get_decoder()
    cos_TD, sin_TD = _rotary(decoder, len(embedded_TH), embedded_TH.dtype)
    x_TH = embedded_TH
    for number, layer in enumerate(decoder.layers):
        positions = kept if number in gated else list(range(len(x_TH)))
        y_KH = _layer(layer, x_TH[positions], cos_TD[positions], sin_TD[positions])
        rows = [x_TH[t] for t in range(len(x_TH))]
        for slot, position in enumerate(positions):
            rows[position] = y_KH[slot]
        x_TH = torch.stack(rows)
    total = x_TH.new_zeros(())
    for position, target in labels.items():
        logits_V = host.get_output_embeddings()(decoder.norm(x_TH[position]))
        total = total + logits_V.logsumexp(0) - logits_V[target]
    return total


def _rotary(decoder: nn.Module, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = decoder.rotary_emb.inv_freq.to(dtype)
    angles = torch.arange(length, dtype=dtype)[:, None] * frequencies[None]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _layer(layer: nn.Module, x_KH: Tensor, cos_KD: Tensor, sin_KD: Tensor) -> Tensor:
    x_KH = x_KH + _attention(layer.self_attn, layer.input_layernorm(x_KH), cos_KD, sin_KD)
    mlp = layer.mlp
    h_KH = layer.post_attention_layernorm(x_KH)
    return x_KH + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h_KH)) * mlp.up_proj(h_KH))


def _attention(attention: nn.Module, h_KH: Tensor, cos_KD: Tensor, sin_KD: Tensor) -> Tensor:
    num_kept, size = len(h_KH), attention.head_dim
    query = _rotate(attention.q_proj(h_KH).view(num_kept, -1, size), cos_KD, sin_KD)
    key = _rotate(attention.k_proj(h_KH).view(num_kept, -1, size), cos_KD, sin_KD)
    value = attention.v_proj(h_KH).view(num_kept, -1, size)
    per_group = query.shape[1] // key.shape[1]
    later = torch.ones(num_kept, num_kept, dtype=torch.bool).triu(1)
    heads = []
    for head in range(query.shape[1]):
        k, v = key[:, head // per_group], value[:, head // per_group]
        weights = (query[:, head] @ k.T / math.sqrt(size)).masked_fill(later, -math.inf)
        heads.append(weights.softmax(dim=-1) @ v)
    return attention.o_proj(torch.cat(heads, dim=-1))


def _rotate(x_KND: Tensor, cos_KD: Tensor, sin_KD: Tensor) -> Tensor:
    first, second = x_KND.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x_KND * cos_KD[:, None] + turned * sin_KD[:, None]


Gradients = dict[str, Tensor]


def gradients(model: nn.Module) -> Gradients:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(found: Gradients, expected: Gradients) -> Iterable[tuple[str, float, float]]:
    """(name, ||g - g*||, ||g*||) per tensor; the two must name the same tensors."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, wanted in expected.items():
        difference = (found[name].double() - wanted.double()).norm()
        yield name, float(difference), float(wanted.double().norm())


def assert_gradients_equal(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Per tensor ||g - g*|| <= tolerance * ||g*|| + 1e-7 * ||all g*||.

    The second term is for tensors whose gradient is 0 in theory, such as a key bias.
    """
    rows = list(errors(found, expected))
    floor = 1e-7 * math.sqrt(sum(size**2 for _, _, size in rows))
    bad = [
        f"{name}: {error:.2e} > {tolerance:g} * {size:.2e} + {floor:.1e}"
        for name, error, size in rows
        if error > tolerance * size + floor
    ]
    assert not bad, "\n".join(bad)
