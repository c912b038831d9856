"""What a processor writes in the place of a video, and which of its frames it takes.

Both are what the processor itself does with a video of that shape on torch's "meta" device, which
has no pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regate_ds.data.llava.media import VideoShape

PATCHES = {
    "InternVLProcessor": "image_token",
    "LlavaNextVideoProcessor": "video_token",
    "LlavaOnevisionProcessor": "video_token",
    "Qwen2VLProcessor": "video_token",
    "Qwen2_5_VLProcessor": "video_token",
    "Qwen3VLProcessor": "video_token",
}
"""By class of processor: its attribute that is the token of a video's patch. Tests compare each
with the processor's own call."""


_NUM_KNOWN = 64
"""Texts that are kept: one may have a hundred thousand characters, and few videos share one."""


@dataclass(frozen=True)
class WrittenVideo:
    """What stands for a video, and the numbers of the frames that are taken from it."""

    text: str
    taken: tuple[int, ...]


class VideoText:
    """Writes videos as one processor does."""

    def __init__(self, processor: Any, num_frames: int | None) -> None:
        """num_frames: how many to take from a file; None leaves it to the processor."""
        name = type(processor).__name__
        self.lack = lack_of_videos(processor)
        """Why videos cannot be written; None if they can."""
        self.placeholder: str | None = None if self.lack else processor.video_token
        self.patch: str | None = None if self.lack else getattr(processor, PATCHES[name])
        self._processor, self._num_frames = processor, num_frames
        self._known: dict[VideoShape, WrittenVideo] = {}

    def write(self, shape: VideoShape) -> WrittenVideo:
        """Return what stands for a video. ValueError if the processor does not take it."""
        if shape not in self._known:
            if len(self._known) == _NUM_KNOWN:
                self._known.pop(next(iter(self._known)))
            self._known[shape] = self._asked(shape)
        return self._known[shape]

    def settings(self) -> Any:
        """Return what decides the texts, as JSON can hold it."""
        if self.lack:
            return None
        own = json.loads(self._processor.video_processor.to_json_string())
        return {"own": own, "num_frames": self._num_frames}

    def _asked(self, shape: VideoShape) -> WrittenVideo:
        width, height = shape.size
        blank = torch.empty((shape.num_frames, 3, height, width), dtype=torch.uint8, device="meta")
        own = self._processor._merge_kwargs()["videos_kwargs"]
        found = self._processor.video_processor(
            [blank],
            **{**own, **self._sampling(shape), "return_metadata": True},
            video_metadata=[metadata_of(shape, range(shape.num_frames))],
        )
        taken = tuple(int(number) for number in found["video_metadata"][0].frames_indices)
        if not taken:
            raise ValueError(f"none of its {shape.num_frames} frames is taken")
        if "video_grid_thw" not in found:
            # The number of tokens is told by the shape of pixels, which some make an array of.
            found["pixel_values_videos"] = [
                torch.zeros(()).expand(pixels.shape) for pixels in found["pixel_values_videos"]
            ]
        return WrittenVideo(self._processor.replace_video_token(found, 0), taken)

    def _sampling(self, shape: VideoShape) -> dict[str, Any]:
        if not shape.is_file:
            return {"do_sample_frames": False}
        if self._num_frames is None:
            return {}
        # A processor with a rate of its own refuses a number beside it.
        return {"do_sample_frames": True, "num_frames": self._num_frames, "fps": None}


def metadata_of(shape: VideoShape, taken: Sequence[int]) -> dict[str, Any]:
    """Return what a processor is told of a video of which these frames are given."""
    width, height = shape.size
    return {
        "total_num_frames": shape.num_frames,
        "fps": shape.fps,
        "width": width,
        "height": height,
        "duration": shape.num_frames / shape.fps if shape.fps else None,
        "frames_indices": list(taken),
    }


def lack_of_videos(processor: Any) -> str | None:
    """Return why a processor is given no videos; None if it is."""
    name = type(processor).__name__
    if name not in PATCHES:
        return f"videos are not given to a {name} yet"
    if not callable(getattr(processor, "video_processor", None)):
        return f"the {name} takes videos only where torchvision is installed"
    return None
