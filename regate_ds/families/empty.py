"""The smallest image in each form that towers take, of zeros.

Each function is given the model's config and a tensor whose dtype and device the image gets, and
returns the inputs of ``get_image_features``, or of what stands in its place.

Shapes: I images (one here), P patches, C channels.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from regate_ds.families.image_lengths import crop_side


def empty_square(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of the tower's one size: [1, C, height, width]."""
    height, width = pair(config.vision_config.image_size)
    return {"pixel_values": like.new_zeros(1, _channels(config.vision_config), height, width)}


def empty_still(config: Any, like: Tensor) -> dict[str, Tensor]:
    """The same under Video-LLaVA's name for a picture that is no clip."""
    return {"pixel_values_images": empty_square(config, like)["pixel_values"]}


def empty_clip(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A video of one such picture: [1, 1, C, height, width]."""
    return {"pixel_values_videos": empty_square(config, like)["pixel_values"][None]}


def empty_tile(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one tile in a batch of one row: [1, 1, C, height, width].

    Not of zeros: Idefics takes these for the padding of a row with fewer pictures.
    """
    return {"pixel_values": empty_square(config, like)["pixel_values"][None] + 1.0}


def empty_sized(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of two merged patches with its size, for Pixtral's towers.

    With one, transformers 5.24 takes the axis of patches for that of pictures.
    """
    merge = getattr(config, "spatial_merge_size", 1)
    side = config.vision_config.patch_size * merge
    return {
        "pixel_values": like.new_zeros(1, _channels(config.vision_config), side, 2 * side),
        "image_sizes": torch.tensor([[side, 2 * side]], device=like.device),
    }


def empty_tiles(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A small picture and the tiles of the large one, [1, P, C, side, side], with its size."""
    side = config.vision_config.image_size
    count = import_module("transformers.models.llava_next.modeling_llava_next")
    num_tiles = count.image_size_to_num_patches(
        image_size=[side, side], grid_pinpoints=config.image_grid_pinpoints, patch_size=side
    )
    shape = (1, num_tiles, _channels(config.vision_config), side, side)
    return {
        "pixel_values": like.new_zeros(shape),
        "image_sizes": torch.tensor([[side, side]], device=like.device),
    }


def empty_grid(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one merged patch, as a list of patches [P, C * time * side^2] with its grid."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", 1)
    times = getattr(vision, "temporal_patch_size", 1)
    size = _channels(vision) * times * vision.patch_size**2
    return {
        "pixel_values": like.new_zeros(merge * merge, size),
        "image_grid_thw": torch.tensor([[1, merge, merge]], device=like.device),
    }


def empty_grid_of_pictures(config: Any, like: Tensor) -> dict[str, Tensor]:
    """The same with patches that are small pictures: [P, C, side, side]."""
    vision, (merge, _) = config.vision_config, pair(config.vision_config.merge_kernel_size)
    side = vision.patch_size
    return {
        "pixel_values": like.new_zeros(merge * merge, _channels(vision), side, side),
        "image_grid_thw": torch.tensor([[1, merge, merge]], device=like.device),
    }


def empty_grid_with_merge(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one patch that is not merged, with its grid and its merge."""
    vision = config.vision_config
    return {
        "pixel_values": like.new_zeros(1, _channels(vision) * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 1, 1]], device=like.device),
        "image_merge_sizes": torch.tensor([1], device=like.device),
    }


def empty_padded(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one merged patch, [1, P, C * side^2], with its shape and its mask."""
    vision, merge = config.vision_config, config.downsample_factor
    size = _channels(vision) * vision.patch_size**2
    return {
        "pixel_values": like.new_zeros(1, merge * merge, size),
        "spatial_shapes": torch.tensor([[merge, merge]], device=like.device),
        "pixel_attention_mask": torch.ones(1, merge * merge, dtype=torch.long, device=like.device),
    }


def empty_strip(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one merged patch as a strip of patches, [1, C, side, P * side]."""
    side = config.vision_config.patch_size
    return {
        "pixel_values": like.new_zeros(1, _channels(config.vision_config), side, 16 * side),
        "target_sizes": torch.tensor([[4, 4]], dtype=torch.int32, device=like.device),
    }


def empty_crops(config: Any, like: Tensor) -> dict[str, Tensor]:
    """A picture of one crop, [1, 2, C, side, side], for Phi-4 multimodal's module of images, which
    also puts its tokens into a row: here into one of them alone."""
    vision, half = config.vision_config, crop_side(config.vision_config)
    side, patches = vision.crop_size, vision.crop_size // vision.patch_size
    ids_1T = torch.full((1, 2 * half * (half + 1) + 1), vision.image_token_id, device=like.device)
    return {
        "input_ids": ids_1T,
        "inputs_embeds": like.new_zeros(*ids_1T.shape, config.hidden_size),
        "image_pixel_values": like.new_zeros(1, 2, _channels(vision), side, side),
        "image_sizes": torch.tensor([[side, side]], device=like.device),
        "image_attention_mask": like.new_ones(1, 2, patches, patches),
    }


def pair(size: Any) -> tuple[int, int]:
    """Return height and width of a size that a config has as one number or as two."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _channels(vision: Any) -> int:
    return getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
