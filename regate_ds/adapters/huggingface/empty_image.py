"""Run the vision tower of a micro-batch without an image: on an empty one, times zero.

Ranks of one ZeRO group must all reduce the same parameters, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KNOWN_HOSTS = ("llava", "qwen2_vl", "qwen2_5_vl")
"""`model_type` of the hosts whose towers take the empty image that is made here."""

PIXELS = ("pixel_values", "pixel_values_videos")
"""Inputs of a multimodal model that make it run its tower."""


def with_empty_image(host: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Embed the text here, plus zero times the features of an empty image.

    ValueError for a host whose tower wants more than pixels: then each micro-batch needs an image.
    """
    if host.config.model_type not in KNOWN_HOSTS:
        raise ValueError(
            f"a micro-batch without an image, on several ranks: for a {host.config.model_type} "
            f"model no empty image is known (only for {KNOWN_HOSTS}); put a sample with an image "
            "into every micro-batch"
        )
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
    embedded = host.get_input_embeddings()(inputs["input_ids"])
    if hasattr(host.base_model, "rope_deltas") and rest.get("position_ids") is None:
        # Given embeddings, the host would count on from an earlier micro-batch's images.
        rest["position_ids"] = torch.arange(embedded.shape[1], device=embedded.device).expand(
            embedded.shape[:2]
        )
    features = host.base_model.get_image_features(**_empty_image(host, embedded), return_dict=True)
    zero = sum(f.sum() for f in features.pooler_output) * 0.0
    return {**rest, "inputs_embeds": embedded + zero.to(embedded.dtype)}


def _empty_image(host: nn.Module, like: Tensor) -> dict[str, Tensor]:
    vision = host.config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        side = vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=like.device)
        return {"pixel_values": like.new_zeros(side * side, size), "image_grid_thw": grid}
    shape = (1, vision.num_channels, vision.image_size, vision.image_size)
    return {"pixel_values": like.new_zeros(shape)}
