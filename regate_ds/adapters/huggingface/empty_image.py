"""Run the vision tower of a micro-batch without an image: on an empty one, times zero.

Ranks of one ZeRO group must all reduce the same parameters, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regate_ds.families.table import FAMILIES, find_family

PIXELS = ("pixel_values", "pixel_values_videos")
"""Inputs of a multimodal model that make it run its tower."""


def with_empty_image(host: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Embed the text here, plus zero times the features of an empty image.

    ValueError for a host whose tower wants more than pixels: then each micro-batch needs an image.
    """
    family = find_family(host)
    if family is None:
        raise ValueError(
            f"a micro-batch without an image, on several ranks: for a {host.config.model_type} "
            f"model no empty image is known (only for {tuple(FAMILIES)}); put a sample with an "
            "image into every micro-batch"
        )
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
    embedded = host.get_input_embeddings()(inputs["input_ids"])
    if family.num_position_axes > 1 and rest.get("position_ids") is None:
        # Given embeddings, the host would count on from an earlier micro-batch's images.
        rest["position_ids"] = torch.arange(embedded.shape[1], device=embedded.device).expand(
            embedded.shape[:2]
        )
    image = family.empty_image(host.config.vision_config, embedded)
    features = host.base_model.get_image_features(**image, return_dict=True)
    zero = sum(f.sum() for f in features.pooler_output) * 0.0
    return {**rest, "inputs_embeds": embedded + zero.to(embedded.dtype)}
