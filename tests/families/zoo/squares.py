"""Multimodal families whose images are squares of one size, or tiles of such squares."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.families.zoo.family import Family
from tests.families.zoo.multimodal import tiny_multimodal, tower
from tests.families.zoo.pixels import (
    crops,
    mark_answers,
    mark_images,
    mark_images_by_token_type,
    padded_patches,
    patches_with_places,
    rows_of_tiles,
    sized,
    squares,
    squares_as_stills,
    strips,
    tiles,
    tiles_of_rows,
    tokens_of_crops,
    tokens_of_shuffled,
    tokens_of_stills,
)

PINPOINTS = [[16, 32], [32, 16], [32, 32]]
NO_WINDOW = {"sliding_window": None}


def _family(name: str, model_class: str, make_images: Any, **fields: Any) -> Family:
    """Return a record; ``more`` are fields of the record, all others of the config."""
    model_type, _, decoder = name.partition(" over ")
    more = fields.pop("more", {})
    if decoder:
        fields["decoder"] = decoder.partition(",")[0]
    config = partial(tiny_multimodal, model_type.partition(",")[0], **fields)
    full = f"{model_class}ForConditionalGeneration" if "For" not in model_class else model_class
    return Family(name=name, model_class=full, config=config, make_images=make_images, **more)


LLAMA4_TOWER = {
    "image_size": 32,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "intermediate_size": 128,
}
DOCLING_TOWER = {"image_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0, 1]}
JANUS_CODES = {"base_channels": 32, "num_patches": 2, "projection_dim": 64, "num_embeddings": 8}
PERCEIVER = {
    "resampler_n_latents": 4,
    "resampler_n_heads": 4,
    "resampler_head_dim": 16,
    "resampler_depth": 1,
}
PHI4_TOWER = {"image_size": 32, "crop_size": 32}
LAST_LAYER = {"vision_feature_layer": -1}
GEMMA = {"extra_inputs": mark_images_by_token_type}
SAME_SIZE = {"projection_dim": 64}
MARKED = {"extra_inputs": mark_images, "settings": {"position_axes": 3}}
PALIGEMMA = {"extra_inputs": mark_answers, "settings": {"packs": False, "mask_always": True}}

SQUARES = (
    *(
        _family(f"llava over {decoder}", "Llava", squares, **LAST_LAYER)
        for decoder in ("llama", "qwen2", "mistral", "qwen3", "gemma2", "granite", "phi3")
    ),
    _family("llava over mistral, no window", "Llava", squares, text=NO_WINDOW, **LAST_LAYER),
    _family("llava_next", "LlavaNext", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER),
    _family(
        "llava_next over mistral", "LlavaNext", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER
    ),
    _family(
        "llava_next_video", "LlavaNextVideo", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER
    ),
    _family("llava_onevision", "LlavaOnevision", tiles, image_grid_pinpoints=PINPOINTS),
    _family("vipllava", "VipLlava", squares, vision_feature_layers=[-1, -2]),
    _family(
        "video_llava",
        "VideoLlava",
        squares_as_stills,
        more={"count_tokens": tokens_of_stills},
        **LAST_LAYER,
    ),
    *(
        _family(f"internvl over {decoder}", "InternVL", squares, vision={"image_size": [16, 16]})
        for decoder in ("qwen2", "qwen3", "qwen3_moe", "gpt_oss")
    ),
    _family("gemma3", "Gemma3", squares, mm_tokens_per_image=4, more=GEMMA),
    _family("paligemma", "PaliGemma", squares, more=PALIGEMMA, **SAME_SIZE),
    _family("paligemma over gemma2", "PaliGemma", squares, more=PALIGEMMA, **SAME_SIZE),
    _family("aya_vision", "AyaVision", squares),
    _family("cohere2_vision", "Cohere2Vision", squares, alignment_intermediate_size=48),
    _family("deepseek_vl", "DeepseekVL", squares),
    _family("got_ocr2", "GotOcr2", squares),
    _family("ovis2", "Ovis2", squares),
    _family("qianfan_ocr", "QianfanOCR", squares),
    _family(
        "janus",
        "Janus",
        squares,
        vision={"projection_dim": 64, "num_image_tokens": 4},
        vq_config=JANUS_CODES,
    ),
    _family("aria", "Aria", squares, projector_patch_to_query_dict={4: 4}),
    _family(
        "llama4", "Llama4", squares, vision=LLAMA4_TOWER, more={"count_tokens": tokens_of_shuffled}
    ),
    _family("smolvlm", "SmolVLM", rows_of_tiles, scale_factor=2),
    _family("idefics3", "Idefics3", rows_of_tiles, scale_factor=2),
    _family("idefics2", "Idefics2", rows_of_tiles, perceiver_config=PERCEIVER),
    _family(
        "idefics2 over mistral, no window",
        "Idefics2",
        rows_of_tiles,
        text=NO_WINDOW,
        perceiver_config=PERCEIVER,
    ),
    _family("granite_docling", "GraniteDocling", tiles_of_rows, vision=DOCLING_TOWER),
    _family("mistral3", "Mistral3", sized),
    _family("mistral3 over mistral, window", "Mistral3", sized, text={"sliding_window": 8}),
    _family("mistral3 over ministral3", "Mistral3", sized),
    _family("lighton_ocr", "LightOnOcr", sized),
    _family(
        "gemma4",
        "Gemma4",
        patches_with_places,
        vision_config=tower("gemma4_vision", patch_size=4, position_embedding_size=16),
        more={"extra_inputs": mark_images},
    ),
    _family("lfm2_vl", "Lfm2Vl", padded_patches),
    _family("minicpmv4_6", "MiniCPMV4_6", strips),
    _family("minicpmv4_7", "MiniCPMV4_7", strips, more=MARKED),
    _family(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        crops,
        vision=PHI4_TOWER,
        more={"count_tokens": tokens_of_crops},
    ),
)
