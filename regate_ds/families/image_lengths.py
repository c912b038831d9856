"""How many tokens each image of a micro-batch has, where its inputs do not simply say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regate_ds.algorithm.batch import number_runs


def lengths_of_runs(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the length of each run of placeholders, for families whose templates put other tokens
    between any two images. A tile between its tags is a run.

    ValueError if the inputs have a size for each image, and the runs are of another number.
    """
    is_image_BT = inputs["input_ids"] == config.image_token_id
    lengths: list[int] = []
    for run_T in number_runs(is_image_BT):
        lengths += torch.bincount(run_T[run_T >= 0]).tolist()
    sizes = inputs.get("image_sizes")
    if sizes is not None and len(sizes) != len(lengths):
        raise ValueError(
            f"the batch has {len(sizes)} images, but {len(lengths)} runs of placeholders; put "
            "another token between any two images, or number them by 'regate_images'"
        )
    return {config.image_token_id: lengths}


def lengths_of_crops(config: Any, inputs: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return what Phi-4 multimodal makes of each image: the crops without their padding, each line
    with an end, a separator, and the small picture."""
    vision, pixels = config.vision_config, inputs.get("image_pixel_values")
    if pixels is None:
        return {vision.image_token_id: []}
    half = crop_side(vision)
    small = half * (half + 1)
    crops_IP = [crop_mask[1:] for crop_mask in torch.as_tensor(inputs["image_attention_mask"])]
    ratios_I2 = torch.as_tensor(inputs["image_sizes"]).view(-1, 2) // vision.crop_size
    lengths = []
    for mask_Phw, (high, wide) in zip(crops_IP, ratios_I2.tolist(), strict=True):
        grid = mask_Phw[: high * wide, ::2, ::2].view(high, wide, half, half).transpose(1, 2)
        seen = grid.reshape(high * half, wide * half)
        height, width = int(seen[:, 0].sum()), int(seen[0].sum())
        lengths.append(height * (width + 1) + 1 + small)
    return {vision.image_token_id: lengths}


def crop_side(vision: Any) -> int:
    """Return how many tokens a crop of Phi-4 multimodal has on a side: two patches are one."""
    return (vision.crop_size // vision.patch_size + 1) // 2
