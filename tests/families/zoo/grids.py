"""Multimodal families whose images have any size, as a list of patches and a grid."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families.zoo.family import Family
from tests.families.zoo.multimodal import tiny_multimodal
from tests.families.zoo.pixels import (
    grids,
    grids_of_patches,
    grids_with_merges,
    mark_images,
)

MARKED = {"extra_inputs": mark_images, "settings": {"position_axes": 3}}
PLAIN: dict[str, Any] = {}


def _family(
    name: str, model_class: str, more: Any, *, make_images: Any = grids, **fields: Any
) -> Family:
    model_type, _, decoder = name.partition(" over ")
    if decoder:
        fields["decoder"] = decoder
    fields["vision"] = {"patch_size": 4, "spatial_merge_size": 2, **fields.get("vision", {})}
    config = partial(tiny_multimodal, model_type, **fields)
    full = f"{model_class}ForConditionalGeneration"
    return Family(name=name, model_class=full, config=config, make_images=make_images, **more)


ONE_AXIS = {"extra_inputs": mark_images}
OMNI = {"extra_inputs": mark_images, "settings": {"position_axes": 3, "mask_never": True}}


def _rope(*sections: int) -> dict[str, Any]:
    """Return rotary settings of a decoder whose positions have three axes."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


THREE = _rope(2, 3, 3)
WINDOWED = {"window_size": 16, "fullatt_block_indexes": [1]}
DEEP = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}

GRIDS = (
    _family("qwen2_vl", "Qwen2VL", MARKED, text=THREE, vision={"hidden_size": 64}),
    _family("qwen2_5_vl", "Qwen2_5_VL", MARKED, text=THREE, vision=WINDOWED),
    _family("qwen2_5_omni_thinker", "Qwen2_5OmniThinker", OMNI, text=THREE, vision=WINDOWED),
    _family("qwen3_vl", "Qwen3VL", MARKED, vision=DEEP),
    _family("qwen3_vl_moe", "Qwen3VLMoe", MARKED, vision=DEEP),
    _family("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinker", OMNI, vision=DEEP),
    _family("qwen3_5", "Qwen3_5", MARKED, vision={"num_position_embeddings": 16}),
    _family("qwen3_5_moe", "Qwen3_5Moe", MARKED, vision={"num_position_embeddings": 16}),
    _family("cosmos3_omni", "Cosmos3Omni", MARKED, vision=DEEP),
    _family("cosmos3_edge", "Cosmos3Edge", MARKED),
    _family("cohere_compass", "CohereCompass", MARKED),
    _family("glm4v", "Glm4v", MARKED, text=THREE),
    _family("glm46v", "Glm46V", MARKED, text=THREE),
    _family("glm4v_moe", "Glm4vMoe", MARKED, text=_rope(2, 1, 1)),
    _family("glm_ocr", "GlmOcr", MARKED, text=THREE),
    _family("exaone4_5", "Exaone4_5_", ONE_AXIS, vision=WINDOWED),
    _family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoe",
        MARKED,
        text={"moe_intermediate_size": [32, 32], **_rope(3, 3, 2)},
    ),
    _family("hunyuan_vl", "HunYuanVL", MARKED, text={"head_dim": 16, **_rope(2, 2, 2, 2)}),
    _family("hyperclovax_vision_v2", "HyperCLOVAXVisionV2", PLAIN, vision=WINDOWED),
    _family("paddleocr_vl", "PaddleOCRVL", MARKED, make_images=grids_of_patches, text=THREE),
    _family("minimax_m3_vl", "MiniMaxM3Sparse", PLAIN),
    _family(
        "muse_glimmer",
        "MuseGlimmer",
        PLAIN,
        vision={"patch_temporal": 1},
        out_hidden_size=128,
        projector_hidden_size=32,
    ),
    _family("lfm3_vl", "Lfm3Vl", PLAIN),
    _family("kimi_k25", "Kimi_K25", PLAIN, make_images=grids_of_patches, projection_hidden_size=32),
    _family("video_llama_3", "VideoLlama3", PLAIN, make_images=grids_with_merges),
)
