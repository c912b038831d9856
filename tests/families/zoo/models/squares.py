"""Multimodal families whose images are squares of one size, or tiles of such squares."""

from __future__ import annotations

from tests.families.zoo.models.multimodal import family, tower
from tests.families.zoo.models.pixels import (
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
PALIGEMMA = {"extra_inputs": mark_answers, "settings": {"mask_always": True}}

_OVER = (
    "llama",
    "qwen2",
    "mistral",
    "qwen3",
    "gemma2",
    "granite",
    "phi3",
    "qwen3_5_text",
    "mixtral",
    "qwen3_moe",
)

SQUARES = (
    *(family(f"llava over {decoder}", "Llava", squares, **LAST_LAYER) for decoder in _OVER),
    family("llava over mistral, no window", "Llava", squares, text=NO_WINDOW, **LAST_LAYER),
    family("llava_next", "LlavaNext", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER),
    family(
        "llava_next over mistral", "LlavaNext", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER
    ),
    family(
        "llava_next_video", "LlavaNextVideo", tiles, image_grid_pinpoints=PINPOINTS, **LAST_LAYER
    ),
    family("llava_onevision", "LlavaOnevision", tiles, image_grid_pinpoints=PINPOINTS),
    family("vipllava", "VipLlava", squares, vision_feature_layers=[-1, -2]),
    family(
        "video_llava",
        "VideoLlava",
        squares_as_stills,
        more={"count_tokens": tokens_of_stills},
        **LAST_LAYER,
    ),
    *(
        family(f"internvl over {decoder}", "InternVL", squares, vision={"image_size": [16, 16]})
        for decoder in ("qwen2", "qwen3", "qwen3_moe", "gpt_oss")
    ),
    family("gemma3", "Gemma3", squares, mm_tokens_per_image=4, more=GEMMA),
    family("paligemma", "PaliGemma", squares, more=PALIGEMMA, **SAME_SIZE),
    family("paligemma over gemma2", "PaliGemma", squares, more=PALIGEMMA, **SAME_SIZE),
    family("aya_vision", "AyaVision", squares),
    family("cohere2_vision", "Cohere2Vision", squares, alignment_intermediate_size=48),
    family("deepseek_vl", "DeepseekVL", squares),
    family("got_ocr2", "GotOcr2", squares),
    family("ovis2", "Ovis2", squares),
    family("qianfan_ocr", "QianfanOCR", squares),
    family(
        "janus",
        "Janus",
        squares,
        vision={"projection_dim": 64, "num_image_tokens": 4},
        vq_config=JANUS_CODES,
    ),
    family("aria", "Aria", squares, projector_patch_to_query_dict={4: 4}),
    family(
        "llama4", "Llama4", squares, vision=LLAMA4_TOWER, more={"count_tokens": tokens_of_shuffled}
    ),
    family("smolvlm", "SmolVLM", rows_of_tiles, scale_factor=2),
    family("idefics3", "Idefics3", rows_of_tiles, scale_factor=2),
    family("idefics2", "Idefics2", rows_of_tiles, perceiver_config=PERCEIVER),
    family(
        "idefics2 over mistral, no window",
        "Idefics2",
        rows_of_tiles,
        text=NO_WINDOW,
        perceiver_config=PERCEIVER,
    ),
    family("granite_docling", "GraniteDocling", tiles_of_rows, vision=DOCLING_TOWER),
    family("mistral3", "Mistral3", sized),
    family("mistral3 over mistral, window", "Mistral3", sized, text={"sliding_window": 8}),
    family("mistral3 over ministral3", "Mistral3", sized),
    family("lighton_ocr", "LightOnOcr", sized),
    family(
        "gemma4",
        "Gemma4",
        patches_with_places,
        vision_config=tower("gemma4_vision", patch_size=4, position_embedding_size=16),
        more={"extra_inputs": mark_images},
    ),
    family("lfm2_vl", "Lfm2Vl", padded_patches),
    family("minicpmv4_6", "MiniCPMV4_6", strips),
    family("minicpmv4_7", "MiniCPMV4_7", strips, more=MARKED),
    family(
        "phi4_multimodal",
        "Phi4MultimodalForCausalLM",
        crops,
        vision=PHI4_TOWER,
        more={"count_tokens": tokens_of_crops},
    ),
)
