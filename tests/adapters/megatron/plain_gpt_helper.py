"""The slow, plain reference for GPTModel: one process, one sample at a time, every layer gathers.

Nothing here is shared with the fast path but names and shapes of weights. Double precision.

Shapes: T tokens of a sample, K kept ones, H hidden, N heads, D size of a head. Positions have
three axes, which are equal but for mrope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regate_ds.algorithm.batch import IGNORE
from regate_ds.algorithm.plan import ElisionPlan
from tests.adapters.megatron.build_helper import MROPE_SECTION, YARN, full_weight
from tests.adapters.megatron.cases_helper import (
    EXPERTS,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LATENT,
    VOCABULARY,
    Case,
    Item,
    positions_of,
)
from tests.adapters.megatron.llava_helper import IMAGE_AT, ImageItem, PlainVision
from tests.support.patches import plain_samples

SIZE = HIDDEN // HEADS


@dataclass
class PlainModel:
    """Full weights by name, made on first use."""

    case: Case
    weights: dict[str, Tensor]
    vision: PlainVision | None = None
    dtype: torch.dtype = torch.double
    routed: dict[str, list[Tensor]] = field(default_factory=dict)
    """Router's logits of a micro-batch's tokens, by layer."""
    entropies: list[Tensor] = field(default_factory=list)
    """Entropy at each target that ran, in the order of the losses."""

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.weights:
            self.weights[name] = full_weight(name, shape).to(self.dtype).requires_grad_()
        return self.weights[name]

    @property
    def gated(self) -> range:
        last = self.case.last_layer or self.case.num_layers
        return range(self.case.first_layer, last)


def sample_losses(
    model: PlainModel,
    embedded_TH: Tensor,
    where_3T: Tensor,
    kept: list[int],
    targets: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Loss of each target of one sample: a position that is kept, and what it predicts."""
    x_TH = embedded_TH
    for number in range(model.case.num_layers):
        at = kept if number in model.gated else list(range(len(x_TH)))
        y_KH = _layer(model, number, x_TH[at], where_3T[:, at])
        x_TH = x_TH.index_copy(0, torch.tensor(at), y_KH)
    norm = model.weight("decoder.final_layernorm.weight", HIDDEN)
    head = _head(model)
    losses = []
    for position, target in targets:
        logits_V = head @ _normed(x_TH[position], norm)
        losses.append(logits_V.logsumexp(0) - logits_V[target])
        model.entropies.append(-(logits_V.softmax(0) @ logits_V.log_softmax(0)).detach())
    return losses


def embedded(model: PlainModel, item: Item) -> Tensor:
    """[B, T, H]"""
    table = model.weight("embedding.word_embeddings.weight", VOCABULARY, HIDDEN)
    if not isinstance(item, ImageItem):
        return table[item.ids_BT]
    assert model.vision is not None
    features_IPH = model.vision(item.images.to(model.dtype))
    ids_BT = item.ids_BT.clamp(min=0)
    num_rows, end = len(ids_BT), IMAGE_AT + len(features_IPH) // len(ids_BT)
    images_BPH = features_IPH.reshape(num_rows, -1, HIDDEN)
    return torch.cat([table[ids_BT[:, :IMAGE_AT]], images_BPH, table[ids_BT[:, end:]]], dim=1)


def batch_losses(model: PlainModel, item: Item, plan: ElisionPlan) -> Tensor:
    """Losses of the kept targets [L], in reading order.

    Of the plan only the kept set is used, and where answers stay the positions with a loss.
    """
    embedded_BTH, batch = embedded(model, item), item.tokens
    real, scored = set(plan.position_R.tolist()), set(plan.label_position_L.tolist())
    if model.case.execution == "loss_only":
        assert real == set((batch.segment_BT >= 0).flatten().nonzero().flatten().tolist())
    if model.case.execution in ("loss_only", "elide_images"):
        assert scored <= real
    else:
        scored = real
    num_tokens, where_3BT = embedded_BTH.shape[1], positions_of(model.case, item)
    found: list[Tensor] = []
    for r, row in enumerate(batch.segment_BT.tolist()):
        for s in range(max(row) + 1):
            positions = [t for t in range(num_tokens) if row[t] == s]
            kept = [i for i, t in enumerate(positions) if r * num_tokens + t in real]
            labels = batch.labels_BT[r, positions].tolist()
            at = [i for i in kept if r * num_tokens + positions[i] in scored]
            targets = [(i, labels[i]) for i in at if labels[i] != IGNORE]
            x_TH, where_3T = embedded_BTH[r, positions], where_3BT[:, r, positions]
            if model.case.positions != "mrope":
                where_3T = torch.arange(len(positions)).expand(3, -1)
            found += sample_losses(model, x_TH, where_3T, kept, targets)
    return torch.stack(found) if found else torch.zeros(0, dtype=model.dtype)


def merged_losses(model: PlainModel, item: Item) -> Tensor:
    """Losses [L] of a merged micro-batch's targets, in reading order: each by the patch before."""
    x_NH, labels = embedded(model, item).flatten(0, 1), item.tokens.labels_BT.flatten().tolist()
    found: list[Tensor] = []
    for _, patches, targets in plain_samples(item.tokens, model.case.merged):
        means = torch.stack([sum(x_NH[p] for p in members) / len(members) for members in patches])
        where, kept = torch.arange(len(means)).expand(3, -1), [*range(len(means))]
        wanted = [(number, labels[p]) for number, p in targets if labels[p] != IGNORE]
        found += sample_losses(model, means, where, kept, wanted)
    return torch.stack(found) if found else torch.zeros(0, dtype=model.dtype)


def balance_loss(model: PlainModel) -> Tensor:
    """The auxiliary loss of the micro-batch that ran last, as Megatron scales it: per token."""
    total = torch.zeros((), dtype=model.dtype)
    for parts in model.routed.values():
        logits_NE = torch.cat(parts)
        chosen_E = torch.zeros(EXPERTS, dtype=model.dtype)
        for which in logits_NE.topk(2, dim=-1).indices.reshape(-1).tolist():
            chosen_E[which] += 1
        share_E = logits_NE.softmax(-1).mean(0)
        load_E = chosen_E / (2 * len(logits_NE))
        total = total + model.case.aux * EXPERTS * (share_E * load_E).sum() * len(logits_NE)
    model.routed.clear()
    return total


def _head(model: PlainModel) -> Tensor:
    tied = model.case.model == "tied"
    name = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    return model.weight(name, VOCABULARY, HIDDEN)


def _normed(x: Tensor, weight_H: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight_H


def _layer(model: PlainModel, number: int, x_KH: Tensor, where_3K: Tensor) -> Tensor:
    name = f"decoder.layers.{number}"
    x_KH = x_KH + _attention(
        model, name, _normed(x_KH, model.weight(f"{name}.input_layernorm.weight", HIDDEN)), where_3K
    )
    h_KH = _normed(x_KH, model.weight(f"{name}.pre_mlp_layernorm.weight", HIDDEN))
    if model.case.model == "moe":
        return x_KH + _experts(model, f"{name}.mlp", h_KH)
    return x_KH + _mlp(model, f"{name}.mlp", h_KH)


def _mlp(model: PlainModel, name: str, h_KH: Tensor) -> Tensor:
    gate, value = (h_KH @ model.weight(f"{name}.linear_fc1.weight", 2 * FFN, HIDDEN).T).chunk(
        2, dim=-1
    )
    return (torch.nn.functional.silu(gate) * value) @ model.weight(
        f"{name}.linear_fc2.weight", HIDDEN, FFN
    ).T


def _experts(model: PlainModel, name: str, h_KH: Tensor) -> Tensor:
    """Each token goes to its two best experts, weighted by the softmax over these two."""
    logits_KE = h_KH @ model.weight(f"{name}.router.weight", EXPERTS, HIDDEN).T
    model.routed.setdefault(name, []).append(logits_KE)
    best, which = logits_KE.topk(2, dim=-1)
    share = best.softmax(-1)
    rows = []
    for k in range(len(h_KH)):
        chosen = [
            share[k, i]
            * _mlp(model, f"{name}.experts.local_experts.{int(which[k, i])}", h_KH[k : k + 1])[0]
            for i in range(2)
        ]
        rows.append(chosen[0] + chosen[1])
    return torch.stack(rows)


def _latent_attention(model: PlainModel, name: str, h_KH: Tensor, where_3K: Tensor) -> Tensor:
    """Queries, keys and values by way of few values; all heads share the turned part of a key."""
    q_rank, rank = LATENT["q_lora_rank"], LATENT["kv_lora_rank"]
    plain, turned, value_size = (
        LATENT[name] for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    )

    def weight(part: str, *shape: int) -> Tensor:
        return model.weight(f"{name}.self_attention.{part}.weight", *shape)

    q_KR = _normed(
        h_KH @ weight("linear_q_down_proj", q_rank, HIDDEN).T, weight("q_layernorm", q_rank)
    )
    q_KND = (q_KR @ weight("linear_q_up_proj", HEADS * (plain + turned), q_rank).T).view(
        len(h_KH), HEADS, -1
    )
    down_KR = h_KH @ weight("linear_kv_down_proj", rank + turned, HIDDEN).T
    kv_KR = _normed(down_KR[:, :rank], weight("kv_layernorm", rank))
    up_KND = (kv_KR @ weight("linear_kv_up_proj", HEADS * (plain + value_size), rank).T).view(
        len(h_KH), HEADS, -1
    )
    later = torch.ones(len(h_KH), len(h_KH), dtype=torch.bool).triu(1)
    shared = _rotate(model.case, _pairs_apart(down_KR[:, rank:]), where_3K)
    heads = []
    for head in range(HEADS):
        angle = _rotate(model.case, _pairs_apart(q_KND[:, head, plain:]), where_3K)
        query = torch.cat([q_KND[:, head, :plain], angle], dim=1)
        key = torch.cat([up_KND[:, head, :plain], shared], dim=1)
        scores = (query @ key.T / math.sqrt(plain + turned)).masked_fill(later, -math.inf)
        heads.append(scores.softmax(-1) @ up_KND[:, head, plain:])
    return torch.cat(heads, dim=-1) @ weight("linear_proj", HIDDEN, HEADS * value_size).T


def _pairs_apart(x_KD: Tensor) -> Tensor:
    """Neighbours are a pair here; elsewhere a pair is half of the values apart."""
    return torch.cat([x_KD[:, 0::2], x_KD[:, 1::2]], dim=1)


def _attention(model: PlainModel, name: str, h_KH: Tensor, where_3K: Tensor) -> Tensor:
    if model.case.model == "latent":
        return _latent_attention(model, name, h_KH, where_3K)
    per_group = HEADS // GROUPS
    qkv = model.weight(
        f"{name}.self_attention.linear_qkv.weight", GROUPS * (per_group + 2) * SIZE, HIDDEN
    )
    mixed = (h_KH @ qkv.T).view(len(h_KH), GROUPS, per_group + 2, SIZE)
    later = torch.ones(len(h_KH), len(h_KH), dtype=torch.bool).triu(1)
    heads = []
    for group in range(GROUPS):
        key = _rotate(model.case, mixed[:, group, per_group], where_3K)
        value = mixed[:, group, per_group + 1]
        for head in range(per_group):
            query = _rotate(model.case, mixed[:, group, head], where_3K)
            scores = (query @ key.T / math.sqrt(SIZE)).masked_fill(later, -math.inf)
            heads.append(scores.softmax(-1) @ value)
    projection = model.weight(f"{name}.self_attention.linear_proj.weight", HIDDEN, HIDDEN)
    return torch.cat(heads, dim=-1) @ projection.T


def _rotate(case: Case, x_KD: Tensor, where_3K: Tensor) -> Tensor:
    axis, frequency, factor = _turning(case, x_KD.shape[1])
    angle = where_3K.float()[axis].T * frequency
    angle = torch.cat([angle, angle], dim=-1)
    first, second = x_KD.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return factor * (x_KD * angle.cos().to(x_KD.dtype) + turned * angle.sin().to(x_KD.dtype))


def _turning(case: Case, size: int) -> tuple[list[int], Tensor, float]:
    """Axis and frequency of each pair of values of a head; and the factor of sine and cosine."""
    # As Megatron: frequencies in single precision.
    frequency = 1.0 / (10000 ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if case.positions == "mrope":
        return [n for n in range(3) for _ in range(MROPE_SECTION[n])], frequency, 1.0
    if case.positions == "rope":
        return [0] * (size // 2), frequency, 1.0
    scale = YARN["yarn_rotary_scaling_factor"]
    longest = YARN["yarn_original_max_position_embeddings"]

    def pair(turns: float) -> float:
        """The pair, counted from 0, that turns so often over the positions trained before."""
        return size * math.log(longest / (2 * math.pi * turns)) / (2 * math.log(10000))

    # Pairs that turn fast stay as they are, slow ones are stretched, those between are mixed.
    low = max(math.floor(pair(YARN["yarn_beta_fast"])), 0)
    high = min(math.ceil(pair(YARN["yarn_beta_slow"])), size - 1)
    stretched = ((torch.arange(size // 2) - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (1 - stretched) + frequency / scale * stretched
    return [0] * (size // 2), frequency, 0.1 * math.log(scale) + 1.0
