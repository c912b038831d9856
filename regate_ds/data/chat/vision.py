"""The image and video inputs of a student, as its own processor makes them.

Shapes: B rows, T positions, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from regate_ds.data.chat.image_text import ImageText
from regate_ds.data.chat.video_text import metadata_of
from regate_ds.data.llava.clips import Clip, Visual

_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")


class ProcessorVision:
    """Makes image inputs by the processor's own call."""

    def __init__(self, processor: Any, patch: str) -> None:
        """patch: the token that the model puts an image's features in the place of."""
        self.processor = processor
        self._text = ImageText(processor, patch)
        self._marks = _name_of_marks(processor)

    def num_tokens(self, size: tuple[int, int]) -> int:
        return self._text.num_patches(size)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of an image's patches; one row where they form no grid."""
        grid_13 = self.pixels([Image.new("RGB", size)]).get("image_grid_thw")
        if grid_13 is None:
            return 1, self.num_tokens(size)
        merge = self.processor.image_processor.merge_size
        return int(grid_13[0, 1]) // merge, int(grid_13[0, 2]) // merge

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        return self.sample_pixels([[image] for image in images])

    def sample_pixels(self, samples: Sequence[Sequence[Visual]]) -> dict[str, Tensor]:
        """Make what the processor makes of a batch of samples that show these.

        ValueError if it cannot join their videos.
        """
        images = [[each for each in shown if not isinstance(each, Clip)] for shown in samples]
        clips = [each for shown in samples for each in shown if isinstance(each, Clip)]
        try:
            found = self.processor(
                images=[each for each in images if each] or None,
                text=["".join(map(self._placeholder, shown)) for shown in samples],
                padding=True,
                return_tensors="pt",
                **_of_clips(clips),
            )
        except ValueError as error:
            lengths = sorted({len(clip.frames) for clip in clips})
            if len(lengths) < 2:
                raise
            name = type(self.processor).__name__
            raise ValueError(
                f"the {name} joins no videos of {lengths} frames in a micro-batch ({error}); set "
                "data.video_frames, or a micro-batch of 1"
            ) from error
        return {name: value for name, value in found.items() if name not in _OF_TEXT}

    def _placeholder(self, shown: Visual) -> str:
        if not isinstance(shown, Clip):
            return self._text.placeholder
        assert self._text.video_placeholder is not None
        return self._text.video_placeholder

    def extra_inputs(self, input_ids_BT: Tensor, is_placeholder_BT: Tensor) -> dict[str, Tensor]:
        """Mark text (0) and image (1) positions where the processor does."""
        if self._marks is None:
            return {}
        marks = self.processor.create_mm_token_type_ids(input_ids_BT.tolist())
        return {self._marks: torch.tensor(marks)}


def _of_clips(clips: Sequence[Clip]) -> dict[str, Any]:
    """Return what a processor's call takes for videos whose frames are chosen."""
    if not clips:
        return {}
    return {
        "videos": [np.stack([np.asarray(frame) for frame in clip.frames]) for clip in clips],
        "video_metadata": [metadata_of(clip.shape, clip.taken) for clip in clips],
        "do_sample_frames": False,
    }


def _name_of_marks(processor: Any) -> str | None:
    """Return under which name the processor marks image positions; None if it does not."""
    if not processor.return_mm_token_type_ids:
        return None
    # Gemma 3's processor renames them.
    is_renamed = type(processor).__name__ == "Gemma3Processor"
    return "token_type_ids" if is_renamed else "mm_token_type_ids"
