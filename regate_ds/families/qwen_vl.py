"""Qwen2-VL and Qwen2.5-VL: images of any size, and rotary positions with three axes.

Shapes: I images of a micro-batch, P pixel patches of all its images, B rows, T positions, L layers,
S positions of the tower, M patches of a merged token, n merged tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from regate_ds.families.empty import empty_grid
from regate_ds.families.family import Family

_INPUTS = ("pixel_values", "image_grid_thw")

_PROCESSORS = ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")


@dataclass(frozen=True)
class Qwen2VLVision:
    """The number of an image's tokens depends on its size, and positions have three axes."""

    processor: Any

    @classmethod
    def of(cls, config: Any, processor: Any) -> Qwen2VLVision:
        """Make the vision inputs. ValueError if the processor is not one of Qwen2-VL's."""
        if type(processor).__name__ not in _PROCESSORS:
            raise ValueError(
                f"image processor {type(processor).__name__} does not fit a {config.model_type} "
                "model; put the preprocessor_config.json of a Qwen2VLImageProcessor into its folder"
            )
        return cls(processor)

    def num_tokens(self, size: tuple[int, int]) -> int:
        width, height = size
        num_patches = self.processor.get_number_of_image_patches(height, width)
        return num_patches // self.processor.merge_size**2

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        (_, rows, columns), *_ = self.pixels([Image.new("RGB", size)])["image_grid_thw"].tolist()
        return rows // self.processor.merge_size, columns // self.processor.merge_size

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Make ``pixel_values`` [P, 3 * frames * patch^2] and ``image_grid_thw`` [I, 3]."""
        return dict(self.processor(list(images), return_tensors="pt"))

    def sample_pixels(self, samples: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        return self.pixels([image for images in samples for image in images])

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        """Mark text (0) and image (1) positions: the model derives its three axes from the marks.

        A text-only micro-batch needs no marks: the model then counts plain positions.
        """
        if not bool(is_placeholder_BT.any()):
            return {}
        return {"mm_token_type_ids": is_placeholder_BT.to(torch.int32)}


def lengths_of_grids(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the merged patches of each temporal step: a clip's steps are an image each."""
    area = config.vision_config.spatial_merge_size**2
    return {
        token: [h * w // area for t, h, w in _rows(inputs.get(name)) for _ in range(t)]
        for token, name in (
            (config.image_token_id, "image_grid_thw"),
            (config.video_token_id, "video_grid_thw"),
        )
    }


def _rows(grid_I3: Any) -> list[list[int]]:
    """Return time, height and width in patches of each image; no row without images."""
    return [] if grid_I3 is None else torch.as_tensor(grid_I3).tolist()


def _patches(config: Any, inputs: dict[str, Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Join the patches of each merged token, which lie one after the other."""
    found, merged = _sizes(config, inputs), config.vision_config.spatial_merge_size**2
    return list(inputs["pixel_values"].unflatten(0, (-1, merged)).flatten(1).split(found))


def _attention(config: Any, inputs: dict[str, Tensor], received_LBS: Tensor) -> list[Tensor]:
    """Add up what the patches of each merged token receive."""
    merged = config.vision_config.spatial_merge_size**2
    received_Ln = received_LBS[:, 0].unflatten(1, (-1, merged)).sum(dim=2)
    return list(received_Ln.split(_sizes(config, inputs), dim=1))


def _sizes(config: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Return the number of merged tokens of each image."""
    num_patches_I = inputs["image_grid_thw"].prod(dim=1)
    return (num_patches_I // config.vision_config.spatial_merge_size**2).tolist()


def _windowed_attention(
    config: Any, inputs: dict[str, Tensor], received_LBS: Tensor
) -> list[Tensor]:
    """Put what Qwen2.5-VL's tower has in the order of its windows into reading order.

    In most layers a patch attends to its window alone: that is the attention that there is.
    """
    vision, grid = config.vision_config, inputs["image_grid_thw"]
    merged = vision.spatial_merge_size**2
    order_n, _ = import_module("transformers.vision_utils").get_vision_window_index(
        grid,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    received_LBnM = received_LBS.unflatten(2, (-1, merged))
    read_LBS = received_LBnM[:, :, order_n.argsort().to(received_LBS.device)].flatten(2)
    return _attention(config, inputs, read_LBS)


QWEN2_VL = Family(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    tower="visual",
    plain_text="qwen2",
    num_position_axes=3,
    empty_image=empty_grid,
    image_lengths=lengths_of_grids,
    image_inputs=_INPUTS,
    patches=_patches,
    attention=_attention,
    vision_inputs=Qwen2VLVision.of,
)

QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    tower="visual",
    plain_text="qwen2",
    num_position_axes=3,
    empty_image=empty_grid,
    image_lengths=lengths_of_grids,
    image_inputs=_INPUTS,
    patches=_patches,
    attention=_windowed_attention,
)
