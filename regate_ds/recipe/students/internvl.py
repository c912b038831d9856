"""Make an InternVL with fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from regate_ds.families.internvl import InternVLVision
from regate_ds.recipe.students.student import (
    Student,
    fresh_model,
    require_size,
    token_id,
    vocabulary,
)


def build_internvl(
    tokenizer: PreTrainedTokenizerFast,
    *,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    seed: int | None,
    image_token: str = "<image>",
) -> Student:
    """Make an InternVL with fresh weights; four patches of its tower are a token.

    With ``seed`` None the model is on "meta": it has shapes, but cannot run.
    ``text`` and ``vision`` are config dicts with their ``model_type`` (``qwen3``, ``qwen2``,
    ``llama``; ``internvl_vision``); vocabulary and special ids come from the tokenizer.
    """
    require_size("model.vision", vision, "image_size")
    config = InternVLConfig(
        text_config={**text, **vocabulary(tokenizer)},
        vision_config=dict(vision),
        image_token_id=token_id(tokenizer, image_token),
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
    )
    inputs = InternVLVision.of(config, internvl_processor(int(vision["image_size"])))
    config.image_seq_length = inputs.num_image_tokens
    return Student(fresh_model(InternVLForConditionalGeneration, config, seed), tokenizer, inputs)


def internvl_processor(image_size: int) -> GotOcr2ImageProcessorPil:
    """Make the processor that brings every picture to the tower's size, without tiles."""
    size = {"height": image_size, "width": image_size}
    return GotOcr2ImageProcessorPil(size=size, crop_to_patches=False)
