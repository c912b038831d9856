"""Text decoders whose layers were tested: causal, with one tensor in and out of each.

A multimodal model's decoder is looked up here by its own ``model_type``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextDecoder:
    """What may be done with a decoder; a decoder without a record is refused by name."""

    shards: bool = True
    """Whether DeepSpeed cuts its layers right, as our tests have seen (teacher/sharding)."""

    in_megatron: bool = False
    """Whether its weights are known in Megatron-core's names."""

    has_qkv_bias: bool = False
    """Whether queries, keys and values have a bias, as Megatron-core must be told."""

    num_position_axes: int = 1
    """Rotary axes; an image has three in some families."""


TEXT_DECODERS: dict[str, TextDecoder] = {
    "llama": TextDecoder(in_megatron=True),
    "mistral": TextDecoder(),
    "qwen2": TextDecoder(in_megatron=True, has_qkv_bias=True),
    "qwen2_vl_text": TextDecoder(shards=False, has_qkv_bias=True, num_position_axes=3),
    "qwen2_5_vl_text": TextDecoder(shards=False, has_qkv_bias=True, num_position_axes=3),
}
"""By ``model_type``."""


def decoders_that(ability: str) -> tuple[str, ...]:
    """The ``model_type`` of those decoders whose record has ``ability``, for messages."""
    return tuple(name for name, record in TEXT_DECODERS.items() if getattr(record, ability))
