"""Families whose tower takes pictures, or tiles of them, of one size.

Each picture or tile has the same number of tokens, and counts as an image of its own.
"""

from __future__ import annotations

from regate_ds.families.empty import (
    empty_clip,
    empty_crops,
    empty_square,
    empty_still,
    empty_tile,
)
from regate_ds.families.family import Family
from regate_ds.families.image_lengths import lengths_of_crops, lengths_of_runs
from regate_ds.families.llava import equal_lengths

_SQUARES = {
    "aya_vision": "AyaVisionForConditionalGeneration",
    "cohere2_vision": "Cohere2VisionForConditionalGeneration",
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "shieldgemma2": "Gemma3ForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
    "ovis2": "Ovis2ForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "pp_chart2table": "GotOcr2ForConditionalGeneration",
    "qianfan_ocr": "QianfanOCRForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
}

_TOWERS = {"deepseek_vl": "vision_model"}
"""Names of towers that are not called ``vision_tower``."""

_TILES_OF_ROWS = {
    "idefics2": "Idefics2ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}


def _family(model_type: str, model_class: str) -> Family:
    return Family(
        model_type=model_type,
        model_class=model_class,
        tower=_TOWERS.get(model_type, "vision_tower"),
        empty_image=empty_square,
        image_lengths=equal_lengths,
    )


def _of_rows(model_type: str, model_class: str) -> Family:
    return Family(
        model_type=model_type,
        model_class=model_class,
        tower="vision_model",
        decoder="text_model",
        empty_image=empty_tile,
        # The pictures of a row are padded by pictures of zeros, which have no tokens.
        image_lengths=lengths_of_runs,
    )


SQUARES: tuple[Family, ...] = (
    *(_family(model_type, model_class) for model_type, model_class in _SQUARES.items()),
    *(_of_rows(model_type, model_class) for model_type, model_class in _TILES_OF_ROWS.items()),
    Family(
        model_type="video_llava",
        model_class="VideoLlavaForConditionalGeneration",
        tower="image_tower",
        empty_image=empty_still,
        empty_video=empty_clip,
        image_inputs=("pixel_values_images",),
    ),
    Family(
        model_type="phi4_multimodal",
        model_class="Phi4MultimodalForCausalLM",
        tower="embed_tokens_extend.image_embed.img_processor",
        embedder="embed_tokens_extend",
        empty_image=empty_crops,
        # It projects each image by itself.
        runs_by_image=True,
        image_lengths=lengths_of_crops,
        image_inputs=("image_pixel_values", "image_sizes", "image_attention_mask"),
    ),
)
