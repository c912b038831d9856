"""The text decoders whose layers were tested: causal, with one tensor in and one out of each layer.

The decoder of a multimodal model is looked up here by its own ``model_type``, not the model's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextDecoder:
    """What a decoder can be used for. A decoder without a record is refused by name."""

    shards: bool = True
    """Whether DeepSpeed cuts the layers correctly, as our tests show (teacher/sharding)."""

    in_megatron: bool = False
    """Whether the weights' names in Megatron-core are known."""

    has_qkv_bias: bool = False
    """Whether queries, keys and values have a bias; Megatron-core must be told."""

    num_position_axes: int = 1
    """Number of rotary axes; an image has three in some families."""


TEXT_DECODERS: dict[str, TextDecoder] = {
    "llama": TextDecoder(in_megatron=True),
    "mistral": TextDecoder(),
    "qwen2": TextDecoder(in_megatron=True, has_qkv_bias=True),
    "qwen2_vl_text": TextDecoder(shards=False, has_qkv_bias=True, num_position_axes=3),
    "qwen2_5_vl_text": TextDecoder(shards=False, has_qkv_bias=True, num_position_axes=3),
}
"""The records, by ``model_type``."""


def decoders_that(ability: str) -> tuple[str, ...]:
    """Return the ``model_type`` of the decoders whose record's field ``ability`` is true."""
    return tuple(name for name, record in TEXT_DECODERS.items() if getattr(record, ability))
