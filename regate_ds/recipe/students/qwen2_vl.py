"""Make a small Qwen2-VL with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from regate_ds.families.qwen_vl import Qwen2VLVision
from regate_ds.recipe.students.student import (
    Student,
    fresh_model,
    require_size,
    token_id,
    vocabulary,
)


def build_qwen2_vl(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    seed: int | None,
    image_token: str = "<image>",
) -> Student:
    """Make a Qwen2-VL with fresh weights; ``vision["max_pixels"]`` bounds an image's tokens.

    With ``seed`` None the model is on "meta": it has shapes, but cannot run.
    ``text["rope_parameters"]`` needs an ``mrope_section`` that sums to half the head size.
    """
    require_size("model.vision", vision, "max_pixels")
    require_size("model.text", text, "hidden_size")
    vision = dict(vision)
    max_pixels = int(vision.pop("max_pixels"))
    config = Qwen2VLConfig(
        text_config={**text, **vocabulary(tokenizer)},
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        image_token_id=token_id(tokenizer, image_token),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    inputs = Qwen2VLVision(qwen2_vl_processor(config.vision_config, max_pixels=max_pixels))
    return Student(fresh_model(Qwen2VLForConditionalGeneration, config, seed), tokenizer, inputs)


def qwen2_vl_processor(vision: Any, *, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """Make the processor of a small Qwen2-VL's vision config; larger images are shrunk."""
    smallest = (vision.patch_size * vision.spatial_merge_size) ** 2
    if max_pixels < smallest:
        raise ValueError(
            f"model.vision.max_pixels={max_pixels}: must be at least {smallest}, one merged patch"
        )
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": smallest, "longest_edge": max_pixels},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )
