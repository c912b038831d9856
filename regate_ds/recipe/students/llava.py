"""A LLaVA student made on the spot, and how it takes images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor

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

    With ``seed`` None the model is on "meta": it can be asked, but not run.
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


@dataclass(frozen=True)
class LlavaVision:
    """Every image becomes the same number of tokens, whatever its size."""

    processor: BaseImageProcessor
    num_image_tokens: int

    @classmethod
    def of(cls, config: LlavaConfig, processor: BaseImageProcessor) -> LlavaVision:
        """Find the number of tokens by asking the tower itself, on no memory at all."""
        height, width = _fixed_size(processor)
        with torch.device("meta"):
            tower = AutoModel.from_config(config.vision_config)
            features = tower(torch.zeros(1, 3, height, width)).last_hidden_state
        # "default" cuts the class token off, which stands first; "full" keeps every feature.
        num_cut = 1 if config.vision_feature_select_strategy == "default" else 0
        return cls(processor, int(features.shape[1]) - num_cut)

    def num_tokens(self, size: tuple[int, int]) -> int:
        return self.num_image_tokens

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Make ``pixel_values`` [I, 3, H, W] of RGB images."""
        return {"pixel_values": self.processor(list(images), return_tensors="pt")["pixel_values"]}

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        return {}


def clip_processor(image_size: int) -> CLIPImageProcessorPil:
    """Make the processor of a small CLIP-like tower: shorter edge to size, then centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )


def _fixed_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width that images of any shape are brought to.

    Raises:
        ValueError: they are not brought to one size, so images differ in their number of tokens.
    """
    wide, tall = (
        tuple(processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape)
        for size in ((64, 32), (32, 64))
    )
    if len(wide) != 4 or wide != tall:
        raise ValueError(
            f"{type(processor).__name__} makes pixel values {wide} of a wide and {tall} of a tall "
            "image; LLaVA students need a processor with one crop size (such as CLIP's or SigLIP's)"
        )
    return wide[-2], wide[-1]
