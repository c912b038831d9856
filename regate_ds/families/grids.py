"""Families whose images are lists of patches with a grid of time, height and width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regate_ds.families.empty import (
    empty_clip,
    empty_grid,
    empty_grid_of_pictures,
    empty_grid_with_merge,
    empty_padded,
    empty_sized,
    empty_strip,
    empty_tiles,
)
from regate_ds.families.family import Family
from regate_ds.families.image_lengths import lengths_of_runs
from regate_ds.families.qwen_vl import lengths_of_grids

_GRID = ("pixel_values", "image_grid_thw")

_LIKE_QWEN = {
    "glm46v": "Glm46VForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glmga": "Glm46VForConditionalGeneration",
    "glm_ocr": "GlmOcrForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}

_TILED = {
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}

_MINICPM = {
    "minicpmv4_6": "MiniCPMV4_6ForConditionalGeneration",
    "minicpmv4_7": "MiniCPMV4_7ForConditionalGeneration",
}


def _like_qwen(model_type: str, model_class: str) -> Family:
    return Family(
        model_type=model_type,
        model_class=model_class,
        tower="visual",
        num_position_axes=3,
        empty_image=empty_grid,
        image_lengths=lengths_of_grids,
        image_inputs=_GRID,
    )


def _tiled(model_type: str, model_class: str, **more: Any) -> Family:
    return Family(
        model_type=model_type,
        model_class=model_class,
        tower="vision_tower",
        empty_image=empty_tiles,
        image_lengths=lengths_of_runs,
        image_inputs=("pixel_values", "image_sizes"),
        **more,
    )


def _lengths_of_merges(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the merged patches of each image, whose merges differ."""
    grid, merges = inputs.get("image_grid_thw"), inputs.get("image_merge_sizes")
    if grid is None or merges is None:
        return {config.image_token_id: []}
    area_I = torch.as_tensor(merges) ** 2
    return {config.image_token_id: (torch.as_tensor(grid).prod(dim=1) // area_I).tolist()}


def _lengths_of_sizes(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the merged patches of each image from its size in pixels, without the row ends."""
    sizes_I2 = inputs.get("image_sizes")
    side = config.vision_config.patch_size * config.spatial_merge_size
    counts = [] if sizes_I2 is None else (torch.as_tensor(sizes_I2) // side).prod(dim=1).tolist()
    return {config.image_token_id: counts}


GRIDS: tuple[Family, ...] = (
    *(_like_qwen(model_type, model_class) for model_type, model_class in _LIKE_QWEN.items()),
    *(_tiled(model_type, model_class) for model_type, model_class in _TILED.items()),
    # Its videos have no rows, and so do not reach the weight that ends a row.
    _tiled("llava_next_video", "LlavaNextVideoForConditionalGeneration", empty_video=empty_clip),
    Family(
        model_type="kimi_k25",
        model_class="Kimi_K25ForConditionalGeneration",
        tower="vision_tower",
        empty_image=empty_grid_of_pictures,
        image_lengths=lengths_of_runs,
        image_inputs=_GRID,
    ),
    Family(
        model_type="video_llama_3",
        model_class="VideoLlama3ForConditionalGeneration",
        tower="vision_model",
        empty_image=empty_grid_with_merge,
        image_lengths=_lengths_of_merges,
        image_inputs=(*_GRID, "image_merge_sizes"),
    ),
    Family(
        model_type="mistral3",
        model_class="Mistral3ForConditionalGeneration",
        tower="vision_tower",
        empty_image=empty_sized,
        image_lengths=_lengths_of_sizes,
        image_inputs=("pixel_values", "image_sizes"),
    ),
    Family(
        model_type="lfm2_vl",
        model_class="Lfm2VlForConditionalGeneration",
        tower="vision_tower",
        empty_image=empty_padded,
        image_lengths=lengths_of_runs,
        image_inputs=("pixel_values", "spatial_shapes", "pixel_attention_mask"),
    ),
    *(
        Family(
            model_type=model_type,
            model_class=model_class,
            tower="vision_tower",
            empty_image=empty_strip,
            runs_by_image=True,
            image_lengths=lengths_of_runs,
            image_inputs=("pixel_values", "target_sizes"),
        )
        for model_type, model_class in _MINICPM.items()
    ),
)
