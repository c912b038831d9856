"""How each supported student turns images into model inputs and placeholder tokens.

One small class for each family; both satisfy ``VisionInputs`` of data/encode.py, are picklable
(data loader workers carry them) and use transformers' PIL image processors: no torchvision.

Shapes: B rows, T positions, I images of a micro-batch, P pixel patches of all its images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, LlavaConfig, Qwen2VLConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


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


@dataclass(frozen=True)
class Qwen2VLVision:
    """An image becomes as many tokens as its size asks for, and positions have three axes."""

    processor: Qwen2VLImageProcessorPil

    def num_tokens(self, size: tuple[int, int]) -> int:
        width, height = size
        num_patches = self.processor.get_number_of_image_patches(height, width)
        return num_patches // self.processor.merge_size**2

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Make ``pixel_values`` [P, 3 * frames * patch^2] and ``image_grid_thw`` [I, 3]."""
        return dict(self.processor(list(images), return_tensors="pt"))

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        """Mark text (0) and image (1): the model derives its three position axes from it.

        A text-only micro-batch needs no marks, and the model then counts plain positions.
        """
        if not bool(is_placeholder_BT.any()):
            return {}
        return {"mm_token_type_ids": is_placeholder_BT.to(torch.int32)}


def vision_of(
    config: LlavaConfig | Qwen2VLConfig, processor: BaseImageProcessor
) -> LlavaVision | Qwen2VLVision:
    """Choose by the model's config.

    Raises:
        ValueError: the image processor does not belong to the model.
    """
    if isinstance(config, LlavaConfig):
        return LlavaVision.of(config, processor)
    if not isinstance(processor, Qwen2VLImageProcessorPil):
        raise ValueError(
            f"image processor {type(processor).__name__} does not fit a {config.model_type} model; "
            "its folder needs a preprocessor_config.json of a Qwen2VLImageProcessor"
        )
    return Qwen2VLVision(processor)


def clip_processor(image_size: int) -> CLIPImageProcessorPil:
    """Make the processor of a small CLIP-like tower: shorter edge to size, then centre crop."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    )


def qwen2_vl_processor(vision: Any, *, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """Make the processor of a small Qwen2-VL's vision config; larger images are shrunk."""
    smallest = (vision.patch_size * vision.spatial_merge_size) ** 2
    if max_pixels < smallest:
        raise ValueError(f"max_pixels must be at least one merged patch ({smallest}): {max_pixels}")
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": smallest, "longest_edge": max_pixels},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
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
