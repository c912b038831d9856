"""LLaVA: a vision tower with one image size, a projector, and any Llama-like decoder.

Shapes: I images of a micro-batch, B rows, T positions, L layers, S positions of the tower, n tokens
of an image, P values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from regate_ds.families.empty import empty_square
from regate_ds.families.family import Family, transformers_class


@dataclass(frozen=True)
class LlavaVision:
    """Every image becomes the same number of tokens, whatever its size."""

    processor: Any
    num_image_tokens: int

    @classmethod
    def of(cls, config: Any, processor: Any) -> LlavaVision:
        """Find the number of tokens of an image by running the tower without memory, on "meta".

        ValueError if the processor does not bring all images to one size.
        """
        height, width = fixed_size(processor)
        with torch.device("meta"):
            tower = transformers_class("AutoModel").from_config(config.vision_config)
            features = tower(torch.zeros(1, 3, height, width)).last_hidden_state
        return cls(processor, int(features.shape[1]) - _num_cut(config))

    def num_tokens(self, size: tuple[int, int]) -> int:
        return self.num_image_tokens

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        side = math.isqrt(self.num_image_tokens)
        return (side, side) if side**2 == self.num_image_tokens else (1, self.num_image_tokens)

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Make ``pixel_values`` [I, 3, H, W] of RGB images."""
        return {"pixel_values": self.processor(list(images), return_tensors="pt")["pixel_values"]}

    def sample_pixels(self, samples: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        return self.pixels([image for images in samples for image in images])

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        return {}


def fixed_size(processor: Any) -> tuple[int, int]:
    """Return the height and width that images of any shape are brought to.

    ValueError if images of two shapes differ in size, and so in their number of tokens.
    """
    wide, tall = (
        tuple(processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape)
        for size in ((64, 32), (32, 64))
    )
    if len(wide) != 4 or wide != tall:
        raise ValueError(
            f"{type(processor).__name__} makes pixel values {wide} from a wide and {tall} from a "
            "tall image; LLaVA students need a processor with one crop size: use CLIP's or SigLIP's"
        )
    return wide[-2], wide[-1]


def equal_lengths(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return one length for all images; a tower for images of any size is given their sizes."""
    pixels, sizes_I2 = inputs.get("pixel_values"), inputs.get("image_sizes")
    if pixels is not None and sizes_I2 is not None:
        sizes_I2 = torch.as_tensor(sizes_I2) // config.vision_config.patch_size
        return {config.image_token_id: sizes_I2.prod(dim=-1).tolist()}
    num_images = 0 if pixels is None else len(pixels)
    num_positions = int((inputs["input_ids"] == config.image_token_id).sum())
    if num_images and num_positions % num_images:
        raise ValueError(
            f"the batch has {num_images} images, but {num_positions} image positions, which is not "
            "a multiple; give each image as many placeholders as it has tokens"
        )
    return {config.image_token_id: [num_positions // max(1, num_images)] * num_images}


def _patches(config: Any, inputs: dict[str, Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Cut the patches out, in the order of the tower's positions.

    ValueError if the class token is an image token too: it has no patch.
    """
    side = config.vision_config.patch_size
    patches_IPn = F.unfold(inputs["pixel_values"].float(), side, stride=side)
    num_patches, largest = patches_IPn.shape[2], max(sizes)
    if largest > num_patches:
        raise ValueError(
            f"an image has {largest} tokens, but {num_patches} patches: with "
            f"vision_feature_select_strategy={config.vision_feature_select_strategy} the class "
            "token is one of them; use images.ranking=diversity, attention, random or stride"
        )
    # Without a class token, "default" cuts off the first patch.
    first = min(num_patches - largest, _num_cut(config))
    return [patches_Pn.T[first:] for patches_Pn in patches_IPn]


def _attention(config: Any, inputs: dict[str, Tensor], received_LBS: Tensor) -> list[Tensor]:
    num_cut = _num_cut(config)
    return [received_LBS[:, image, num_cut:] for image in range(received_LBS.shape[1])]


def _num_cut(config: Any) -> int:
    """Return how many of the tower's positions are no image tokens: "default" cuts off the class
    token, which comes first; "full" keeps every feature."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


LLAVA = Family(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    tower="vision_tower",
    empty_image=empty_square,
    image_lengths=equal_lengths,
    patches=_patches,
    attention=_attention,
    vision_inputs=LlavaVision.of,
    in_megatron=True,
)
