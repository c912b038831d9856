"""The weights of a Llama- or Mixtral-shaped decoder, by their names in both forms.

Megatron's names count layers and experts through the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from regate_ds.recipe.config.megatron_limits import num_experts

_PLAIN = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
}
"""Names inside a layer that hold one weight in both forms: Megatron's, then Hugging Face's."""

_OUTSIDE_LAYERS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
"""Names outside the layers, in the same order."""

_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names of norms where Transformer Engine's linear layers hold them, and their plain names."""


@dataclass(frozen=True)
class WeightMap:
    """A full weight of Megatron-core, and the Hugging Face weights that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., Tensor] = lambda weight: weight
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda full: (full,)


def parts_of(config: Any) -> Iterator[WeightMap]:
    """Yield every weight that a decoder with this Hugging Face config may have."""
    for ours, theirs in _OUTSIDE_LAYERS.items():
        yield WeightMap(ours, (theirs,))
    for number in range(config.num_hidden_layers):
        at, to = f"model.layers.{number}.", f"decoder.layers.{number}."
        for ours, theirs in _PLAIN.items():
            yield WeightMap(to + ours, (at + theirs,))
        for kind in ("weight", "bias"):
            names = tuple(f"{at}self_attn.{x}_proj.{kind}" for x in "qkv")
            heads = partial(_join_heads, config), partial(_split_heads, config)
            yield WeightMap(f"{to}self_attention.linear_qkv.{kind}", names, *heads)
        yield WeightMap(f"{to}mlp.router.weight", (f"{at}mlp.gate.weight",))
        for mlp in ("mlp.", *(f"mlp.experts.{one}." for one in range(num_experts(config)))):
            names = tuple(f"{at}{mlp}{x}_proj.weight" for x in ("gate", "up"))
            yield WeightMap(f"{to}{mlp}linear_fc1.weight", names, _join_halves, _split_halves)
            yield WeightMap(f"{to}{mlp}linear_fc2.weight", (f"{at}{mlp}down_proj.weight",))


def head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return size or config.hidden_size // config.num_attention_heads


def _join_heads(config: Any, *query_key_value: Tensor) -> Tensor:
    """Join in Megatron's order: each group's queries, then its key, then its value.

    They may be a tensor rank's part, of some of the groups.
    """
    groups, rest = len(query_key_value[1]) // head_size(config), query_key_value[0].shape[1:]
    parts = [x.view(groups, -1, head_size(config), *rest) for x in query_key_value]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def _split_heads(config: Any, joined: Tensor) -> tuple[Tensor, ...]:
    groups, rest = config.num_key_value_heads, joined.shape[1:]
    parts = joined.view(groups, -1, head_size(config), *rest)
    sizes = [config.num_attention_heads // groups, 1, 1]
    return tuple(x.reshape(-1, *rest) for x in parts.split(sizes, dim=1))


def _join_halves(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _split_halves(full: Tensor) -> tuple[Tensor, ...]:
    return full.chunk(2)


def is_of_expert(name: str) -> bool:
    return ".experts." in name


def tensor_group(name: str) -> Any:
    """Return the ranks that a weight is cut over, by its name in either form."""
    if is_of_expert(name):
        return mpu.get_expert_tensor_parallel_group()
    return mpu.get_tensor_model_parallel_group()


def full_name(chunk: Any, name: str) -> str:
    """Return the name in the whole model of a weight of a GPTModel, which is a part of it."""
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    if "local_experts" in parts:
        at = parts.index("local_experts")
        each = chunk.config.num_moe_experts // mpu.get_expert_model_parallel_world_size()
        number = mpu.get_expert_model_parallel_rank() * each + int(parts[at + 1])
        parts[at : at + 2] = [str(number)]
    inside = ".".join(parts[3:])
    return (
        ".".join([*parts[:3], _FUSED_NORMS[inside]]) if inside in _FUSED_NORMS else ".".join(parts)
    )
