"""InternVL: a vision tower with one image size, whose patches are shuffled into fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regate_ds.families.empty import empty_square, pair
from regate_ds.families.family import Family
from regate_ds.families.llava import LlavaVision, equal_lengths, fixed_size


@dataclass(frozen=True)
class InternVLVision(LlavaVision):
    """Every image becomes the same number of tokens: tiles of large pictures are not made."""

    @classmethod
    def of(cls, config: Any, processor: Any) -> InternVLVision:
        """Count the tokens of an image.

        ValueError if the processor cuts pictures into tiles, or brings them to different sizes.
        """
        if getattr(processor, "crop_to_patches", False):
            raise ValueError(
                f"{type(processor).__name__} has crop_to_patches=true, so that large pictures "
                "become several tiles; set it to false in the model's processor_config.json or "
                "preprocessor_config.json, or set data.template=null where the folder has a chat "
                "template: that writes tiles"
            )
        fixed_size(processor)
        vision, shrink = config.vision_config, config.downsample_ratio
        height, width = (
            size // side for size, side in zip(pair(vision.image_size), pair(vision.patch_size))
        )
        return cls(processor, int(height * shrink) * int(width * shrink))


INTERNVL = Family(
    model_type="internvl",
    model_class="InternVLForConditionalGeneration",
    tower="vision_tower",
    empty_image=empty_square,
    image_lengths=equal_lengths,
    vision_inputs=InternVLVision.of,
)
