"""Random images in the forms that vision towers take.

Each function is called as ``(host, generator, number of images)``.

Shapes: I images, P patches, N the most images of a row, B rows, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GRIDS = ((1, 4, 4), (1, 4, 8), (1, 8, 4))
"""Time, height and width of each image in patches, for towers that take any size."""

Images = dict[str, Any]
Marks = dict[str, Tensor]


def squares(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make images of the tower's own size: [I, C, side, side]."""
    side = host.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return {"pixel_values": torch.randn(count, 3, height, width, generator=generator)}


def squares_as_stills(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make the same under the name that Video-LLaVA has for pictures that are no clip."""
    return {"pixel_values_images": squares(host, generator, count)["pixel_values"]}


def sized(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make images of different size, padded to the largest, with their sizes [I, 2]."""
    unit = host.config.vision_config.patch_size * getattr(host.config, "spatial_merge_size", 1)
    sizes_I2 = unit * torch.tensor([[2, 2], [2, 3], [3, 1]][:count])
    pixels = torch.randn(count, 3, *sizes_I2.amax(dim=0).tolist(), generator=generator)
    return {"pixel_values": pixels, "image_sizes": sizes_I2}


def tiles(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make images of one small picture and the tiles of the large one: [I, P, C, side, side]."""
    side = host.config.vision_config.image_size
    sizes_I2 = torch.tensor([[side, 2 * side], [2 * side, side], [side, 2 * side - 4]][:count])
    return {
        "pixel_values": torch.randn(count, 3, 3, side, side, generator=generator),
        "image_sizes": sizes_I2,
    }


def grids(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make images of different size as one list of patches, with their grids [I, 3]."""
    vision = host.config.vision_config
    size = _channels(vision) * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    grid_I3 = torch.tensor(GRIDS[:count])
    pixels = torch.randn(int(grid_I3.prod(dim=1).sum()), size, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid_I3}


def grids_of_patches(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make the same with patches that are small pictures: [P, C, side, side]."""
    made, side = grids(host, generator, count), host.config.vision_config.patch_size
    return {**made, "pixel_values": made["pixel_values"].view(-1, 3, side, side)}


def grids_with_merges(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make the same, with the merge of each image [I]."""
    merges_I = torch.tensor([2, 1, 2][:count])
    return {**grids(host, generator, count), "image_merge_sizes": merges_I}


def rows_of_tiles(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make [B, N, C, side, side] for rows of 2, 0 and 1 images; a picture of zeros is none."""
    side = host.config.vision_config.image_size
    pixels = torch.randn(3, 2, 3, side, side, generator=generator)
    pixels[1] = 0.0
    pixels[2, 1] = 0.0
    return {"pixel_values": pixels}


def tiles_of_rows(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make images of one or two tiles, [I, 2, C, side, side], with a mask of real tiles."""
    side = host.config.vision_config.image_size
    mask_I2 = torch.tensor([[True, False], [True, True], [True, False]][:count])
    pixels = torch.randn(count, 2, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": mask_I2}


def patches_with_places(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make patches [I, P, C * side^2] with their columns and rows [I, P, 2]."""
    vision = host.config.vision_config
    side, pooled = vision.patch_size, vision.pooling_kernel_size
    row, column = torch.meshgrid(torch.arange(2 * pooled), torch.arange(2 * pooled), indexing="ij")
    places_P2 = torch.stack([column, row], dim=-1).flatten(0, 1)
    pixels = torch.rand(count, len(places_P2), 3 * side**2, generator=generator)
    return {"pixel_values": pixels, "image_position_ids": places_P2.expand(count, -1, -1)}


def padded_patches(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make patches of images of different size, padded [I, P, C * side^2], with their sizes."""
    shapes_I2 = torch.tensor([[4, 4], [2, 8], [4, 2]][:count])
    most, side = int(shapes_I2.prod(dim=1).amax()), host.config.vision_config.patch_size
    mask_IP = torch.arange(most) < shapes_I2.prod(dim=1)[:, None]
    pixels = torch.randn(count, most, 3 * side**2, generator=generator)
    return {
        "pixel_values": pixels,
        "spatial_shapes": shapes_I2,
        "pixel_attention_mask": mask_IP.long(),
    }


def strips(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make the patches of all images as one strip [1, C, side, P * side], with their sizes."""
    sizes_I2 = torch.tensor([[4, 4], [4, 8], [8, 4]][:count])
    side, num_patches = host.config.vision_config.patch_size, int(sizes_I2.prod(dim=1).sum())
    pixels = torch.randn(1, 3, side, num_patches * side, generator=generator)
    return {"pixel_values": pixels, "target_sizes": sizes_I2}


def crops(host: Any, generator: torch.Generator, count: int) -> Images:
    """Make a small picture and crops of the large one, as Phi-4 multimodal takes them."""
    vision = host.config.vision_config
    side, patches = vision.crop_size, vision.crop_size // vision.patch_size
    return {
        "image_pixel_values": torch.randn(count, 3, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[side, 2 * side], [2 * side, side], [side, side]][:count]),
        "image_attention_mask": torch.ones(count, 3, patches, patches),
    }


def tokens_of_crops(host: Any, images: Images) -> list[int]:
    """Return how many tokens Phi-4 multimodal makes of each image, with its separators."""
    vision = host.config.vision_config
    half = vision.crop_size // vision.patch_size // 2
    sizes = (images["image_sizes"] // vision.crop_size * half).tolist()
    return [height * (width + 1) + 1 + half * (half + 1) for height, width in sizes]


def tokens_of_shuffled(host: Any, images: Images) -> list[int]:
    """Return how many tokens Llama 4 makes of each image: four patches are one."""
    side = host.config.vision_config.image_size // host.config.vision_config.patch_size
    return [side**2 // 4] * len(images["pixel_values"])


def tokens_of_stills(host: Any, images: Images) -> list[int]:
    """Return how many tokens Video-LLaVA makes of each picture."""
    features = host.get_image_features(images["pixel_values_images"]).pooler_output
    return [len(one) for one in features]


def mark_images(image_BT: Tensor, answer_BT: Tensor, segment_BT: Tensor) -> Marks:
    """Mark text (0) and image (1) positions."""
    return {"mm_token_type_ids": (image_BT >= 0).int()}


def mark_images_for_experts(image_BT: Tensor, answer_BT: Tensor, segment_BT: Tensor) -> Marks:
    """Mark them for positions, and for experts with the tokens before and after each image."""
    marks_BT = (image_BT >= 0).int()
    wider_BT = marks_BT | marks_BT.roll(1, 1) | marks_BT.roll(-1, 1)
    return {"mm_token_type_ids": marks_BT, "moe_mm_token_type_ids": wider_BT}


def mark_images_by_token_type(image_BT: Tensor, answer_BT: Tensor, segment_BT: Tensor) -> Marks:
    """The same under another name."""
    return {"token_type_ids": (image_BT >= 0).int()}


def mark_answers(image_BT: Tensor, answer_BT: Tensor, segment_BT: Tensor) -> Marks:
    """Mark what is not the prompt before a sample's first answer, as PaliGemma's suffix."""
    marks_BT = torch.zeros_like(segment_BT)
    for segment in range(-1, int(segment_BT.max()) + 1):
        within_BT = segment_BT == segment
        marks_BT[within_BT & ((answer_BT & within_BT).int().cumsum(1) > 0)] = 1
    return {"token_type_ids": marks_BT.int()}


def _channels(vision: Any) -> int:
    return getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
