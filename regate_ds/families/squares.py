"""Families whose tower takes pictures, or tiles of them, of one size.

Each picture or tile has the same number of tokens, and counts as an image of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from regate_ds.families.empty import empty_square, empty_still, empty_tile
from regate_ds.families.family import Family
from regate_ds.families.llava import equal_lengths
from regate_ds.families.numbering_by_runs import lengths_of_runs


@dataclass(frozen=True, kw_only=True)
class _Square:
    """Where the parts of one family lie."""

    model_class: str
    tower: str = "vision_tower"
    decoder: str = "language_model"


_SQUARES = {
    "aya_vision": _Square(model_class="AyaVisionForConditionalGeneration"),
    "cohere2_vision": _Square(model_class="Cohere2VisionForConditionalGeneration"),
    "deepseek_vl": _Square(model_class="DeepseekVLForConditionalGeneration", tower="vision_model"),
    "gemma3": _Square(model_class="Gemma3ForConditionalGeneration"),
    "shieldgemma2": _Square(model_class="Gemma3ForConditionalGeneration"),
    "got_ocr2": _Square(model_class="GotOcr2ForConditionalGeneration"),
    "ovis2": _Square(model_class="Ovis2ForConditionalGeneration"),
    "paligemma": _Square(model_class="PaliGemmaForConditionalGeneration"),
    "pp_chart2table": _Square(model_class="GotOcr2ForConditionalGeneration"),
    "qianfan_ocr": _Square(model_class="QianfanOCRForConditionalGeneration"),
    "vipllava": _Square(model_class="VipLlavaForConditionalGeneration"),
}

_TILES_OF_ROWS = {
    "idefics2": "Idefics2ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}


def _family(model_type: str, square: _Square) -> Family:
    return Family(
        model_type=model_type,
        model_class=square.model_class,
        tower=square.tower,
        decoder=square.decoder,
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
    *(_family(model_type, square) for model_type, square in _SQUARES.items()),
    *(_of_rows(model_type, model_class) for model_type, model_class in _TILES_OF_ROWS.items()),
    Family(
        model_type="video_llava",
        model_class="VideoLlavaForConditionalGeneration",
        tower="image_tower",
        empty_image=empty_still,
        image_inputs=("pixel_values_images",),
    ),
)
