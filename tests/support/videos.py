"""Processors with their part for videos: transformers' own where torchvision is installed, else a
plain stand-in for that part, so that what the processors do around it is tested everywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import BatchFeature
from transformers.image_processing_utils import ImageProcessingMixin
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_torchvision_available
from transformers.video_utils import make_batched_metadata, make_batched_videos

from regate_ds.data.llava.media import Video
from tests.support.conversations import random_image
from tests.support.processors import MAKERS, VIDEOS, can_make

ALL_NAMES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava_onevision",
    "internvl",
    "llava_next_video",
)
"""Names of processors that take videos."""

NAMES = [name for name in ALL_NAMES if can_make(name)]

ONE_LENGTH = ("llava_onevision", "internvl", "llava_next_video")
"""Those that join only videos of as many frames."""


@cache
def video_processor(name: str) -> Any:
    """Return the processor of that name, able to read videos."""
    own = MAKERS[name][0]()
    if not is_torchvision_available():
        kind, settings = VIDEOS[type(own).__name__]
        own.video_processor = StandIn(kind, settings)
    return own


class StandIn(ImageProcessingMixin):
    """Takes frames as transformers' classes do, brings them to a size, and cuts them."""

    valid_kwargs = VideosKwargs
    merge_size = temporal_patch_size = 2

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        super().__init__(kind=kind, **settings)
        self.is_grid, self.samples = kind.startswith("Qwen"), kind.startswith("Qwen3")

    def __call__(self, videos: Any, **given: Any) -> BatchFeature:
        videos = make_batched_videos(videos)
        metadata = make_batched_metadata(videos, given["video_metadata"])
        pixels, grids = [], []
        for video, about in zip(videos, metadata):
            frames_FHWC = torch.from_numpy(video) if isinstance(video, np.ndarray) else video
            if frames_FHWC.shape[-1] != 3:
                frames_FHWC = frames_FHWC.permute(0, 2, 3, 1)
            if given.get("do_sample_frames", self.samples):
                about.frames_indices = self._choose(about, given.get("num_frames"))
                frames_FHWC = frames_FHWC[about.frames_indices]
            pixels.append(self._pixels(frames_FHWC.permute(0, 3, 1, 2).float(), grids))
        found: dict[str, Any] = {"video_metadata": metadata}
        if self.is_grid:
            found |= {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.cat(grids)}
        else:
            found["pixel_values_videos"] = pixels
        return BatchFeature(
            found, given.get("return_tensors"), skip_tensor_conversion=["video_metadata"]
        )

    def _choose(self, about: Any, num_frames: int | None) -> list[int]:
        if num_frames is None:
            num_frames = max(2, int(about.total_num_frames / about.fps * self.fps))
        return [number * about.total_num_frames // num_frames for number in range(num_frames)]

    def _pixels(self, frames_FCHW: Tensor, grids: list[Tensor]) -> Tensor:
        if not self.is_grid:
            side = self.size.get("height", 16)
            return interpolate(frames_FCHW, (side, side)) / 255
        height, width = (max(8, side // 16 * 8) for side in frames_FCHW.shape[-2:])
        frames_FCHW = interpolate(frames_FCHW, (height, width)) / 255
        if len(frames_FCHW) % 2:
            frames_FCHW = torch.cat([frames_FCHW, frames_FCHW[-1:]])
        times, rows, columns = len(frames_FCHW) // 2, height // 4, width // 4
        grids.append(torch.tensor([[times, rows, columns]]))
        cut = frames_FCHW.view(times, 2, 3, rows // 2, 2, 4, columns // 2, 2, 4)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, -1)


def random_frames(random: Random, *, num_frames: int | None = None) -> Video:
    """Return a list of frames of one size."""
    height = random.randint(9, 70)
    size = range(height, height + 1)
    count = random.randint(2, 5) if num_frames is None else num_frames
    return Video(tuple(random_image(random, size) for _ in range(count)))


def film(path: Path, num_frames: int, *, rate: int = 10, size: tuple[int, int] = (48, 32)) -> Path:
    """Write a video of a bar that moves; every 6th frame at least is a keyframe."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 6
        for number in range(num_frames):
            picture = Image.linear_gradient("L").resize(size).convert("RGB")
            picture.paste((255, 0, 0), (2 * number, 8, 2 * number + 4, 24))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path
