"""Multimodal families whose images have any size, as a list of patches and a grid."""

from __future__ import annotations

from typing import Any

from tests.families.zoo.models.family import Family
from tests.families.zoo.models.multimodal import family
from tests.families.zoo.models.pixels import (
    grids,
    grids_of_patches,
    grids_with_merges,
    mark_images,
    mark_images_for_experts,
)

MARKED = {"extra_inputs": mark_images, "settings": {"position_axes": 3}}
PLAIN: dict[str, Any] = {}
ERNIE = {"extra_inputs": mark_images_for_experts, "settings": {"position_axes": 3}}
ONE_AXIS = {"extra_inputs": mark_images}
OMNI = {"extra_inputs": mark_images, "settings": {"position_axes": 3, "mask_never": True}}


def _rope(*sections: int) -> dict[str, Any]:
    """Return rotary settings of a decoder whose positions have three axes."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


THREE = _rope(2, 3, 3)
QUARTER = {
    "head_dim": 32,
    "rope_parameters": {**_rope(2, 1, 1)["rope_parameters"], "partial_rotary_factor": 0.25},
}
PLACES = {"num_position_embeddings": 16}
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
DEEP = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}


def _any_size(name: str, model_class: str, more: Any, **fields: Any) -> Family:
    """Return a record whose images are of a list of patches, four of which are a token."""
    vision = {"patch_size": 4, "spatial_merge_size": 2, **fields.pop("vision", {})}
    make_images = fields.pop("make_images", grids)
    return family(name, model_class, make_images, more, vision=vision, **fields)


GRIDS = (
    _any_size("qwen2_vl", "Qwen2VL", MARKED, text=THREE, vision={"hidden_size": 64}),
    _any_size("qwen2_5_vl", "Qwen2_5_VL", MARKED, text=THREE, vision=WINDOWED),
    _any_size("qwen2_5_omni_thinker", "Qwen2_5OmniThinker", OMNI, text=THREE, vision=WINDOWED),
    _any_size("qwen3_vl", "Qwen3VL", MARKED, text=THREE, vision=DEEP),
    _any_size("qwen3_vl_moe", "Qwen3VLMoe", MARKED, text=THREE, vision=DEEP),
    _any_size("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinker", OMNI, text=THREE, vision=DEEP),
    _any_size("qwen3_5", "Qwen3_5", MARKED, text=QUARTER, vision=PLACES),
    _any_size("qwen3_5_moe", "Qwen3_5Moe", MARKED, text=QUARTER, vision=PLACES),
    _any_size("cosmos3_omni", "Cosmos3Omni", MARKED, text=THREE, vision=DEEP),
    _any_size("cosmos3_edge", "Cosmos3Edge", MARKED),
    _any_size("cohere_compass", "CohereCompass", MARKED),
    _any_size("glm4v", "Glm4v", MARKED, text=THREE),
    _any_size("glm46v", "Glm46V", MARKED, text=THREE),
    _any_size("glm4v_moe", "Glm4vMoe", MARKED, text=_rope(2, 1, 1)),
    _any_size("glm_ocr", "GlmOcr", MARKED, text=THREE),
    _any_size("exaone4_5", "Exaone4_5_", ONE_AXIS, vision=WINDOWED),
    _any_size(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoe",
        ERNIE,
        text={"moe_intermediate_size": [32, 32], **_rope(3, 3, 2)},
    ),
    _any_size("hunyuan_vl", "HunYuanVL", MARKED, text={"head_dim": 16, **_rope(2, 2, 2, 2)}),
    _any_size("hyperclovax_vision_v2", "HyperCLOVAXVisionV2", PLAIN, vision=WINDOWED),
    _any_size("paddleocr_vl", "PaddleOCRVL", MARKED, make_images=grids_of_patches, text=THREE),
    _any_size("minimax_m3_vl", "MiniMaxM3Sparse", PLAIN),
    _any_size(
        "muse_glimmer",
        "MuseGlimmer",
        PLAIN,
        vision={"patch_temporal": 1},
        out_hidden_size=128,
        projector_hidden_size=32,
    ),
    _any_size("lfm3_vl", "Lfm3Vl", PLAIN),
    _any_size(
        "kimi_k25", "Kimi_K25", PLAIN, make_images=grids_of_patches, projection_hidden_size=32
    ),
    _any_size("video_llama_3", "VideoLlama3", PLAIN, make_images=grids_with_merges),
)
