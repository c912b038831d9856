"""Measure, check and decode what records show: images, and videos that a processor takes whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from regate_ds.data.llava.images import (
    IMAGE_ERRORS,
    broken,
    image_fault,
    image_size,
    load_all,
    load_rgb,
    sizes_of,
)
from regate_ds.data.llava.media import (
    ImageSource,
    Video,
    VideoFrame,
    VideoShape,
    by_file,
    pictures_alone,
)
from regate_ds.data.llava.records import Record, bad_record, describe
from regate_ds.data.llava.video import read_numbers, video_shape

VisualShape = tuple[int, int] | VideoShape
"""Width and height of an image, or what is known of a video."""


@dataclass(frozen=True)
class Clip:
    """The frames of a video that a processor takes, decoded (RGB)."""

    frames: tuple[Image.Image, ...]
    taken: tuple[int, ...]
    """Their numbers in the video."""

    shape: VideoShape


Visual = Image.Image | Clip
"""What a sample shows, decoded."""


def frame_size(shape: VisualShape) -> tuple[int, int]:
    return shape.size if isinstance(shape, VideoShape) else shape


def shapes_of(record: Record) -> list[VisualShape]:
    """Measure each image and video of a record. SampleError if one is broken."""
    if not any(isinstance(source, Video) for source in record.images):
        return [size for _, size in sizes_of(record)]
    shapes: list[VisualShape] = []
    for source in record.images:
        try:
            shape = _shape(source) if isinstance(source, Video) else image_size(source)
        except IMAGE_ERRORS as error:
            raise bad_record(describe(record, broken(source, error))) from error
        shapes.append(shape)
    return shapes


def visuals_of(record: Record, sources: Sequence[ImageSource]) -> tuple[Visual, ...]:
    """Decode what a sample of the record shows. SampleError if something is broken."""
    shown: list[Visual] = []
    for run in by_file(sources):
        try:
            shown += load_visuals(run)
        except IMAGE_ERRORS as error:
            raise bad_record(describe(record, broken(run[0], error))) from error
    return tuple(shown)


def load_visuals(sources: Sequence[ImageSource]) -> Iterator[Visual]:
    """Decode images and videos in order. One of IMAGE_ERRORS if one is broken."""
    for run in by_file(sources):
        first = run[0]
        if isinstance(first, Video):
            yield _load_clip(first)
        else:
            yield from load_all(pictures_alone(run))


def fault_of(source: ImageSource, *, verify: bool = True) -> str | None:
    """Return why an image or video cannot be used; None if it can.

    verify: False only checks that files exist.
    """
    if not isinstance(source, Video):
        return image_fault(source, verify=verify)
    if isinstance(source.source, Path):
        return image_fault(VideoFrame(source.source, 0, 1), verify=verify)
    faults = (image_fault(frame, verify=verify) for frame in source.source)
    return next((fault for fault in faults if fault), None)


def _shape(video: Video) -> VideoShape:
    """Look at a video. ValueError if its frames differ in size, other IMAGE_ERRORS if broken."""
    if isinstance(video.source, Path):
        return video_shape(video.source)
    sizes = {image_size(frame): frame for frame in video.source}
    if len(sizes) > 1:
        (first, one), (second, other), *_ = sizes.items()
        raise ValueError(
            f"{one} is {first[0]} x {first[1]} pixels, {other} {second[0]} x {second[1]}; give all "
            "frames of a video one size"
        )
    return VideoShape(next(iter(sizes)), len(video.source), None, is_file=False)


def _load_clip(video: Video) -> Clip:
    assert video.shape is not None
    if isinstance(video.source, Path):
        frames = read_numbers(video.source, video.taken)
    else:
        frames = [load_rgb(video.source[number]) for number in video.taken]
    return Clip(tuple(frames), video.taken, video.shape)
