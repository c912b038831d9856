"""Make a small LLaVA with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from regate_ds.families.llava import LlavaVision
from regate_ds.recipe.students.student import (
    Student,
    fresh_model,
    require_size,
    token_id,
    vocabulary,
)


def build_llava(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    seed: int | None,
    image_token: str = "<image>",
) -> Student:
    """Make a LLaVA with fresh weights; the last layer's patch features go to the projector.

    With ``seed`` None the model is on "meta": it has shapes, but cannot run.
    ``text`` and ``vision`` are config dicts with their ``model_type`` (``llama``, ``qwen2``;
    ``clip_vision_model``); vocabulary and special ids come from the tokenizer.
    """
    require_size("model.vision", vision, "image_size")
    config = LlavaConfig(
        text_config={**text, **vocabulary(tokenizer)},
        vision_config=dict(vision),
        image_token_index=token_id(tokenizer, image_token),
        vision_feature_layer=-1,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    inputs = LlavaVision.of(config, clip_processor(vision["image_size"]))
    config.image_seq_length = inputs.num_image_tokens
    return Student(fresh_model(LlavaForConditionalGeneration, config, seed), tokenizer, inputs)


def clip_processor(image_size: int) -> CLIPImageProcessorPil:
    """Make the processor of a small CLIP-like tower: shorter edge to size, then centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )
