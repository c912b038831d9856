"""Random images in the forms that vision towers take.

Shapes: I images, P patches of all images, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GRIDS = ((1, 4, 4), (1, 4, 8), (1, 8, 4))
"""Time, height and width of each image in patches, for towers that take any size."""


def squares(host: Any, generator: torch.Generator, count: int) -> dict[str, Any]:
    """Make images of the tower's own size: [I, C, side, side]."""
    side = host.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return {"pixel_values": torch.randn(count, 3, height, width, generator=generator)}


def grids(host: Any, generator: torch.Generator, count: int) -> dict[str, Any]:
    """Make images of different size as one list of patches, with their grids [I, 3]."""
    vision = host.config.vision_config
    channels = getattr(vision, "in_channels", getattr(vision, "num_channels", 3))
    size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    grid_I3 = torch.tensor(GRIDS[:count])
    num_patches = int(grid_I3.prod(dim=1).sum())
    pixels = torch.randn(num_patches, size, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid_I3}


def mark_images(image_BT: Tensor, answer_BT: Tensor) -> dict[str, Tensor]:
    """Mark text (0) and image (1) positions, as models with three position axes want it."""
    return {"mm_token_type_ids": (image_BT >= 0).int()}
